from __future__ import annotations

import pytest

from guest_agent.view.places import (
    MAX_PLACES,
    Layers,
    Place,
    arranged,
    container,
    image,
    layers,
    path_of,
    volumes,
)

OVERLAY = {"Name": "overlay2", "Data": {"MergedDir": "/d/m", "UpperDir": "/d/u", "LowerDir": "/d/l1:/d/l2"}}


def test_volumes_are_read_write_and_what_is_made_is_their_owners() -> None:
    listed = {"Volumes": [{"Name": "db", "Mountpoint": "/v/db/_data"}, {"Name": "no", "Mountpoint": ""}]}
    assert volumes(listed) == [Place("/volumes/db", "/v/db/_data", read_only=False, inherit=True)]
    assert volumes({"Volumes": None}) == []


def test_a_container_that_runs_is_where_it_is_mounted_and_read_write() -> None:
    found = layers({"GraphDriver": OVERLAY})
    assert found == Layers("/d/m", ("/d/u", "/d/l1", "/d/l2"))
    assert container({"Id": "1" * 64, "Names": ["/web"]}, found, "/d/m") == Place(
        "/containers/web", "/d/m", read_only=False, inherit=True
    )


def test_one_that_does_not_is_its_layers_read_only() -> None:
    assert container({"Id": "1" * 64, "Names": ["/web"]}, Layers("", ("/u", "/l")), "") == Place(
        "/containers/web", layers=("/u", "/l")
    )
    assert container({"Id": "1" * 64, "Names": None}, Layers("", ("/u",)), "") == Place(
        "/containers/" + "1" * 12, "/u"
    )
    assert container({"Id": "1" * 64, "Names": ["/web"]}, Layers(), "") is None


def test_an_image_is_below_its_registry() -> None:
    assert image("ghcr.io/team/app:1.2", Layers("", ("/u", "/l"))) == Place(
        "/images/ghcr.io/team/app:1.2", layers=("/u", "/l")
    )
    assert image("busybox:latest", Layers("", ("/u",))) == Place("/images/busybox:latest", "/u")


@pytest.mark.parametrize(
    "driver", [None, {}, {"Name": "vfs", "Data": {"UpperDir": "/x"}}, {"Name": "overlay2", "Data": None}]
)
def test_what_is_not_in_directories_is_not_shown(driver: object) -> None:
    assert layers({"GraphDriver": driver}) == Layers()


@pytest.mark.parametrize("word", ["", ".", "..", "a//b", "/a", "a/", "a/../b", "x" * 256, "a\0b"])
def test_what_is_no_name_has_no_path(word: str) -> None:
    assert path_of("volumes", word) is None


def test_a_path_is_not_longer_than_fits() -> None:
    assert path_of("images", "/".join(["x" * 100] * 4)) is None
    assert path_of("images", "/".join(["x" * 90] * 4)) is not None


def test_none_lies_in_another_one() -> None:
    paths = ["/images/a:1", "/images/a:1/b", "/images/c/d:1", "/images/c", "/images/a:1"]
    assert [place.path for place in arranged([Place(path, "/x") for path in paths])] == [
        "/images/a:1",
        "/images/c/d:1",
    ]


def test_no_more_are_shown_than_are_bounded() -> None:
    assert (
        len(arranged([Place(f"/volumes/{number}", "/x") for number in range(2 * MAX_PLACES)])) == MAX_PLACES
    )
