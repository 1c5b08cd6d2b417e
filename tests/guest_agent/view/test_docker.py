from __future__ import annotations

from pathlib import Path

import pytest

from guest_agent.view.docker import Docker, NoDocker
from guest_agent.view.places import Place
from tests.guest_agent.view.dockerd import Dockerd


def test_what_there_is(dockerd: Dockerd) -> None:
    dockerd.volume("db", "/v/db/_data")
    dockerd.container(1, "web", "running", "/d/1/merged", "/d/1/diff", "/d/0/diff")
    dockerd.container(2, "old", "exited", "/d/2/merged", "/d/2/diff", "/d/0/diff")
    dockerd.image(3, "app:1", "app:latest", "<none>:<none>", layers=("/d/0/diff",))
    dockerd.image(4, "<none>:<none>", layers=("/d/4/diff",))
    assert Docker(dockerd.path, mounted=lambda path: True).look() == [
        Place("/volumes/db", "/v/db/_data", read_only=False, inherit=True),
        Place("/containers/web", "/d/1/merged", read_only=False, inherit=True),
        Place("/containers/old", layers=("/d/2/diff", "/d/0/diff")),
        Place("/images/app:1", "/d/0/diff"),
        Place("/images/app:latest", "/d/0/diff"),
    ]


def test_where_the_image_store_is_containerds_a_container_is_in_its_task(dockerd: Dockerd) -> None:
    id = dockerd.container(1, "web", "running", "", "/nothing")
    dockerd.answers[f"/containers/{id}/json"] = {"GraphDriver": None}
    task = f"/run/containerd/io.containerd.runtime.v2.task/moby/{id}/rootfs"
    assert Docker(dockerd.path, mounted=lambda path: path == task).look() == [
        Place("/containers/web", task, read_only=False, inherit=True)
    ]


def test_what_never_changes_is_asked_for_once(dockerd: Dockerd) -> None:
    id = dockerd.container(1, "web", "exited", "", "/d/1/diff", "/d/0/diff")
    docker = Docker(dockerd.path)
    assert docker.look() == docker.look()
    assert dockerd.asked.count(f"/containers/{id}/json") == 1
    assert dockerd.asked.count("/volumes") == 2
    dockerd.answers["/containers/json?all=1"] = []
    docker.look()
    dockerd.answers["/containers/json?all=1"] = [{"Id": id, "Names": ["/web"], "State": "exited"}]
    docker.look()
    assert dockerd.asked.count(f"/containers/{id}/json") == 2  # it had gone, and was forgotten


def test_a_container_that_has_just_gone_costs_only_itself(dockerd: Dockerd) -> None:
    id = dockerd.container(1, "web", "exited", "", "/d/1/diff")
    del dockerd.answers[f"/containers/{id}/json"]
    dockerd.volume("db", "/v")
    assert [place.path for place in Docker(dockerd.path).look()] == ["/volumes/db"]


@pytest.mark.parametrize("answer", [b"", b"[", b"7", {"Volumes": 7}, {"Volumes": [{}]}, []])
def test_an_answer_that_makes_no_sense_is_none(dockerd: Dockerd, answer: object) -> None:
    dockerd.answers["/volumes"] = answer
    with pytest.raises(NoDocker):
        Docker(dockerd.path).look()


def test_without_a_dockerd_there_is_nothing(folder: Path) -> None:
    with pytest.raises(NoDocker):
        Docker(folder / "nobody").look()
