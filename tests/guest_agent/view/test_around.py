from __future__ import annotations

from pathlib import Path

from guest_agent.view.around import enterable, in_vm, on_machine
from guest_agent.view.places import Place


def test_of_a_vm_the_data_disk_and_a_home_for_each_user(tmp_path: Path) -> None:
    (tmp_path / "home/ann").mkdir(parents=True)
    (tmp_path / "home/file").touch()
    (tmp_path / "home/link").symlink_to("ann")
    assert in_vm(tmp_path) == [
        Place("/home/ann", str(tmp_path / "home/ann"), read_only=False, inherit=True),
        Place("/data", str(tmp_path)),
    ]
    assert in_vm(tmp_path / "home/ann") == [Place("/data", str(tmp_path / "home/ann"))]


def test_of_a_machine_the_users_home_and_all_that_they_may_read(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    (tmp_path / "link").symlink_to("ann")
    home, machine = on_machine(tmp_path / "link")
    assert (home.path, home.source, home.read_only) == ("/home/link", str(tmp_path / "ann"), False)
    assert (machine.path, machine.source, machine.read_only) == ("/machine", "/", True)
    assert "/proc" in machine.hidden


def test_what_may_not_be_entered_is_left_out() -> None:
    places = [Place("/a", "/1"), Place("/b", layers=("/1", "/2")), Place("/c", layers=("/1", "/1"))]
    assert [place.path for place in enterable(places, lambda path: path == "/1")] == ["/a", "/c"]
