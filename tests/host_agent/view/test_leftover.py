from __future__ import annotations

import json
from pathlib import Path

import pytest

from host_agent.errors import UserError
from host_agent.paths import InstancePaths
from host_agent.view import leftover, unmounting
from host_agent.view.leftover import Wanted, clean, prepare, read_wanted, remove_leftover
from host_agent.view.unmounting import Mounted, mounted, views

MOUNTINFO = rb"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
90 22 0:53 / /home/a\040b/view rw,nosuid - fuse.agentctl-view agentctl:default rw
91 22 0:54 / /mnt rw - fuse.agentctl agentctl-7 rw
92 22 0:55 / /home/a\040b/view rw - fuse.agentctl-view agentctl:default rw
"""


def test_views_are_told_from_other_mounts(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTINFO)
    assert mounted(tmp_path / "mountinfo") == ["/home/a b/view"] * 2
    assert views(tmp_path / "mountinfo")[0] == Mounted("/home/a b/view", "agentctl:default")
    assert mounted(tmp_path / "none") == []


def test_an_empty_folder_is_made_or_taken(instance: InstancePaths, tmp_path: Path) -> None:
    prepare(instance.view, instance)
    prepare(instance.view, instance)
    assert instance.view.stat().st_mode & 0o777 == 0o700
    prepare(tmp_path, instance)


def test_a_place_with_a_view_of_another_instance_is_not_taken_from_it(
    instance: InstancePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unmounting, "views", lambda: [Mounted(str(tmp_path), "agentctl:other:77")])
    with pytest.raises(UserError, match=r"another instance \(other\)"):
        prepare(tmp_path, instance)


class Mounts:
    """A mountinfo, from which the uppermost at a place can be taken off."""

    def __init__(self, *there: Mounted) -> None:
        self.there = list(there)

    def take_off(self, path: str) -> bool:
        self.there.remove([mount for mount in self.there if mount.path == path][-1])
        return True


OTHER = Mounted("/v", "agentctl:mine-too:1")
MINE, LATER = Mounted("/v", "agentctl:mine:2"), Mounted("/v", "agentctl:mine:22")
NO_VIEW = Mounted("/v", "tmpfs", is_view=False)


@pytest.mark.parametrize(
    ("there", "source", "left", "done"),
    [
        ([MINE, LATER], "agentctl:mine", [], True),
        ([MINE, LATER], "agentctl:mine:22", [MINE], True),
        ([LATER], "agentctl:mine:2", [LATER], True),
        ([OTHER], "agentctl:mine", [OTHER], True),
        ([OTHER, MINE], "agentctl:mine", [OTHER], True),
        ([MINE, LATER], "agentctl:mine:2", [MINE, LATER], False),
        ([OTHER, MINE], "", [], True),
        ([MINE, NO_VIEW], "", [MINE, NO_VIEW], False),
        ([NO_VIEW], "", [NO_VIEW], True),
    ],
)
def test_each_takes_off_its_own(
    monkeypatch: pytest.MonkeyPatch, there: list[Mounted], source: str, left: list[Mounted], done: bool
) -> None:
    mounts = Mounts(*there)
    monkeypatch.setattr(unmounting, "_all", lambda: mounts.there)
    monkeypatch.setattr(unmounting, "_take_off", mounts.take_off)
    assert unmounting.unmount("/v", source) is done
    assert mounts.there == left


@pytest.mark.parametrize("kind", ["missing", "file", "full"])
def test_what_cannot_be_one_is_refused(instance: InstancePaths, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.touch()
    elif kind == "full":
        place.mkdir()
        (place / "mine").touch()
    with pytest.raises(UserError) as said:
        prepare(place, instance)
    assert said.value.hint
    assert kind != "full" or (place / "mine").exists()


def test_ours_goes_with_the_view_and_the_users_stays(instance: InstancePaths, tmp_path: Path) -> None:
    prepare(instance.view, instance)
    clean(str(instance.view), instance)
    assert not instance.view.exists()
    clean(str(tmp_path), instance)
    assert tmp_path.exists()


def test_what_is_in_a_folder_is_never_removed(instance: InstancePaths, tmp_path: Path) -> None:
    instance.view.mkdir()
    (instance.view / "not ours").touch()
    instance.view_record.write_text(json.dumps([str(tmp_path), "me"]))
    (tmp_path / "file").touch()
    remove_leftover(instance)
    assert (instance.view / "not ours").exists()
    assert (tmp_path / "file").exists()


def test_one_that_cannot_be_unmounted_is_left_alone(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance.view.mkdir()
    monkeypatch.setattr(leftover.unmounting, "unmount", lambda path, source: False)
    clean(str(instance.view), instance)
    assert instance.view.exists()


def test_what_was_wanted_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "record").write_text(json.dumps(["/there", "guest"]))
    assert read_wanted(tmp_path / "record") == Wanted("/there", "guest")
    for content in ("", "[", "7", '["x"]', "{}"):
        (tmp_path / "record").write_text(content)
        assert read_wanted(tmp_path / "record") is None
    assert read_wanted(tmp_path / "none") is None


def test_nothing_that_is_no_view_is_unmounted(tmp_path: Path) -> None:
    assert unmounting.unmount(str(tmp_path))
    assert unmounting.unmount("/")
    assert Path("/proc/self").exists()
