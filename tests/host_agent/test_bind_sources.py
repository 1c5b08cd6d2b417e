"""Which sources a container may have, on folders of this machine that are shared under names of the guest."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from host_agent.bind_sources import MAX_LINKS, is_own, refusal
from protocol.api import MountSpec


@dataclass(frozen=True)
class Folder:
    """The least a share can be."""

    host_path: Path
    guest_path: str
    real_path: str = ""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Shared at its own path by ``shares``; what is beside it is not."""
    (tmp_path / "home" / "project").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    return tmp_path / "home"


def shared(*paths: Path) -> list[Folder]:
    return [Folder(path, str(path)) for path in paths]


def test_links_are_read_where_the_share_really_is(home: Path) -> None:
    """Its path on the host may mean another folder by now; the guest sees the one that it was given."""
    (home / "out").symlink_to("/elsewhere")
    (home.parent / "alias").symlink_to("other")
    share = Folder(home.parent / "alias", "/src", real_path=str(home))
    assert "leads to /elsewhere" in (refusal("/src/out/x", [share]) or "")
    assert refusal("/src/project", [share]) is None


def test_what_is_below_a_share_is_fine_whether_it_is_there_or_not(home: Path) -> None:
    for source in (home, home / "project", home / "not" / "yet", home / "project" / ".." / "x"):
        assert refusal(str(source), shared(home)) is None
    assert refusal(f"{home}//project/", shared(home)) is None


def test_what_is_not_shared_is_refused_by_name_with_what_to_do(home: Path) -> None:
    other = home.parent / "other"
    assert refusal(str(other), shared(home)) == (
        f"mounts denied: {other} is not shared with the VM; share it: cd {other} && agentctl up"
    )


def test_of_a_file_its_folder_is_to_be_shared(home: Path) -> None:
    file = home.parent / "other" / "a file"
    file.touch()
    assert str(refusal(str(file), shared(home))).endswith(f"share it: cd {file.parent} && agentctl up")


def test_a_folder_that_is_not_there_yet_is_to_be_made_first(home: Path) -> None:
    missing = home.parent / "it's missing"
    said = str(refusal(str(missing), shared(home)))
    assert f"{missing} is not shared with the VM; make and share it: mkdir -p " in said
    assert said.endswith("""it'"'"'s missing' && agentctl up""")


def test_a_socket_of_the_host_is_called_one(home: Path) -> None:
    path = home.parent / "agent"
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(path))
        assert "it is a socket" in str(refusal(str(path), shared(home)))


def test_a_name_that_only_begins_like_a_share_is_not_in_it(home: Path) -> None:
    assert refusal(f"{home}work", shared(home)) is not None


def test_dots_do_not_lead_out_of_a_share(home: Path) -> None:
    assert f"{home.parent}/other is not shared" in str(refusal(f"{home}/../other", shared(home)))


def test_without_shares_everything_of_the_host_is_refused(home: Path) -> None:
    assert refusal(str(home), []) is not None
    assert refusal("/var/run/docker.sock", []) is None


def test_a_folder_above_a_share_is_not_shared(home: Path) -> None:
    assert refusal(str(home.parent), shared(home)) is not None


def test_the_mounts_of_an_instance_are_shares(home: Path) -> None:
    assert refusal(str(home / "x"), [MountSpec(str(home), str(home))]) is None


# --- other names in the guest ------------------------------------------------------------------------


def test_a_share_is_known_by_its_name_in_the_guest(home: Path) -> None:
    shares = [Folder(home, "/mnt/work")]
    assert refusal("/mnt/work/project", shares) is None
    assert refusal(str(home / "project"), shares) == (
        f"mounts denied: {home}/project is /mnt/work/project in the VM; name it so"
    )


def test_the_innermost_share_is_the_one_that_is_seen(home: Path) -> None:
    other = home.parent / "other"
    (other / "link").symlink_to("/nowhere")
    shares = [Folder(home, "/w"), Folder(other, "/w/project")]
    assert "leads to /nowhere" in str(refusal("/w/project/link", shares))
    assert refusal("/w/link", shares) is None


# --- links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["project", "./project/../project", "project/deep/er"])
def test_a_link_within_a_share_is_fine(home: Path, target: str) -> None:
    (home / "link").symlink_to(target)
    (home / "absolute").symlink_to(home / target)
    assert refusal(f"{home}/link/x", shared(home)) is None
    assert refusal(f"{home}/absolute", shared(home)) is None


@pytest.mark.parametrize("target", ["../other", "{parent}/other", "project/up/../other"])
def test_a_link_out_of_every_share_is_refused_with_both_names(home: Path, target: str) -> None:
    (home / "project" / "up").symlink_to("..")
    (home / "link").symlink_to(target.format(parent=home.parent))
    other = home.parent / "other"
    assert refusal(f"{home}/link/sub", shared(home)) == (
        f"mounts denied: {home}/link/sub leads to {other}/sub, which is not shared with the VM; "
        f"make and share it: mkdir -p {other}/sub && cd {other}/sub && agentctl up"
    )


def test_a_link_from_one_share_into_another_is_fine(home: Path) -> None:
    other = home.parent / "other"
    (home / "link").symlink_to(other)
    assert refusal(str(home / "link"), shared(home, other)) is None


def test_a_link_to_a_folder_that_has_another_name_in_the_guest_is_refused(home: Path) -> None:
    other = home.parent / "other"
    (home / "link").symlink_to(other)
    assert refusal(str(home / "link"), [*shared(home), Folder(other, "/mnt/other")]) is not None


def test_a_link_to_a_place_of_the_host_does_not_mean_the_vms(home: Path) -> None:
    """/var/lib/docker would be fine by its own name, but this link shows what the host has there."""
    (home / "link").symlink_to("/var/lib/docker")
    assert "leads to /var/lib/docker" in str(refusal(str(home / "link"), shared(home)))


def test_links_above_a_share_are_not_the_guests(home: Path) -> None:
    """The guest has plain folders on the way to a share."""
    (home.parent / "alias").symlink_to(home)
    alias = home.parent / "alias"
    assert refusal(str(alias / "project"), shared(alias)) is None


def test_links_that_go_in_circles_are_left_to_dockerd(home: Path) -> None:
    (home / "circle").symlink_to("circle")
    assert refusal(str(home / "circle"), shared(home)) is None
    previous = home.parent / "other"
    for number in range(MAX_LINKS):
        link = home / str(number)
        link.symlink_to(previous)
        previous = link
    assert "leads to" in str(refusal(str(previous), shared(home)))


def test_what_cannot_be_a_path_is_left_to_dockerd(home: Path) -> None:
    assert refusal(f"{home}/a\0b", shared(home)) is None
    assert refusal(f"{home}/{'x' * 300}", shared(home)) is None
    assert "not shared" in str(refusal("/srv/a\0b", shared(home)))
    assert "not shared" in str(refusal("/srv/\udcff", shared(home)))


# --- the VM's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "/",
        "/var/run/docker.sock",
        "/run/docker.sock",
        "/run/containerd/containerd.sock",
        "/proc",
        "/proc/1/ns",
        "/sys/fs/cgroup",
        "/dev/fuse",
        "/dev/shm",
        "/lib/modules",
        "/boot",
        "/etc",
        "/etc/localtime",
        "/etc/ssl/certs/ca-certificates.crt",
        "/usr/share/zoneinfo/Europe/Berlin",
        "/usr/bin/docker",
        "/usr/src",
        "/var/log",
        "/var/lib/docker/volumes",
        "/home/ann.guest",
        "/home/ann.guest/work",
        "//var/run/../run/docker.sock",
    ],
)
def test_the_vms_own_places_are_fine(source: str) -> None:
    assert refusal(source, []) is None


@pytest.mark.parametrize(
    "source",
    [
        "/tmp",
        "/tmp/x",
        "/var/tmp",
        "/home",
        "/home/ann",
        "/root",
        "/srv/www",
        "/opt/app",
        "/mnt",
        "/media/usb",
        "/usr/local/share",
        "/usr/share/nginx/html",
        "/etc/nginx",
        "/var/www",
        "/var/log/nginx",
        "/var/lib/postgresql",
        "/run/user/1000/keyring/ssh",
        "/var/run/user/1000",
        "/dockers",
        "/processes",
    ],
)
def test_places_where_people_keep_things_on_the_host_are_not(source: str) -> None:
    assert source in str(refusal(source, []))
    assert not is_own(source)


@pytest.mark.parametrize("source", ["/etc/nginx/nginx.conf", "/home", "/usr/share/nginx"])
def test_what_cannot_be_shared_where_it_is_gets_other_advice(source: str) -> None:
    said = str(refusal(source, []))
    assert "agentctl up" not in said
    assert "copy it to a folder that is shared" in said


def test_a_share_at_one_of_these_places_comes_first(home: Path) -> None:
    (home / "link").symlink_to("/nowhere")
    assert refusal("/var/log/app/link", [Folder(home, "/var/log/app")]) is not None
    assert refusal("/var/log/app/x", [Folder(home, "/var/log/app")]) is None


def test_an_unreadable_folder_is_left_to_dockerd(home: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    closed = home / "closed"
    closed.mkdir()
    closed.chmod(0)
    try:
        assert refusal(str(closed / "x"), shared(home)) is None
    finally:
        closed.chmod(0o700)
