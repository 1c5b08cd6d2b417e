from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from host_agent import mounts
from host_agent.errors import ExitCode, UserError
from protocol.api import MountSpec

HOME = MountSpec("/home/me", "/home/me")


def spec(path: str, guest_path: str = "", *, read_only: bool = False, host_locks: bool = False) -> MountSpec:
    return MountSpec(path, guest_path or path, read_only, host_locks)


# --- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/etc", "/etc/nginx", "/usr", "/usr/local", "/usr/bin", "/var", "/var/lib", "/var/lib/docker"),
        *(
            "/var/lib/docker/volumes",
            "/var/lib/containerd",
            "/tmp",
            "/home",
            "/home/me.guest",
            "/run",
            "/proc/1",
        ),
        *(
            "/sys",
            "/dev",
            "/bin",
            "/boot",
            "/lib",
            "/lib64",
            "/sbin",
            "/var/run",
            "/run/agentctl",
            "/run/media",
        ),
    ],
)
def test_what_the_vm_needs_is_not_hidden(path: str) -> None:
    with pytest.raises(UserError, match=f"^{path} cannot be a mount: .* is the VM's own$") as caught:
        mounts.check([MountSpec("/srv/data", path)])
    assert caught.value.hint.endswith("--mount /srv/data:/mnt/data")
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/home/me",
            "/home/me/x.guest",
            "/home/me.guest/x",
            "/root",
            "/srv",
            "/mnt",
            "/opt/x",
            "/tmp/x",
            "/data",
        ),
        *(
            "/usr/local/src",
            "/usr/src/linux",
            "/var/www",
            "/var/lib/jenkins",
            "/run/media/me/disk",
            "/etcetera",
        ),
        *("/Users/me", "/var/tmp/x", "/library"),
    ],
)
def test_other_places_are_free(path: str) -> None:
    mounts.check([spec(path)])


def test_a_place_is_taken_once() -> None:
    with pytest.raises(UserError, match="/b and /a cannot both be /src in the VM"):
        mounts.check([spec("/a", "/src"), spec("/b", "/src")])
    mounts.check([spec("/a", "/src"), spec("/a", "/src/in"), spec("/a", "/other")])


def test_there_may_be_many_but_not_any_number() -> None:
    mounts.check([spec(f"/d/{number}") for number in range(mounts.MAX_MOUNTS)])
    with pytest.raises(UserError, match="too many to mount"):
        mounts.check([spec(f"/d/{number}") for number in range(mounts.MAX_MOUNTS + 1)])


@pytest.mark.parametrize("path", ["a", "", "/a/", "/a//b", "//a", "/a/../b", "/a/.", "/a/.."])
def test_a_path_is_plain(path: str) -> None:
    for one in (MountSpec(path, "/x"), MountSpec("/x", path)):
        with pytest.raises(UserError, match="is not a plain absolute path"):
            mounts.check([one])


@pytest.mark.parametrize("path", ["/" + "x" * mounts.MAX_PATH, "/a\0b", "/" + "ü" * (mounts.MAX_PATH // 2)])
def test_a_path_is_not_endless(path: str) -> None:
    with pytest.raises(UserError, match="is too long"):
        mounts.check([spec(path)])


def test_a_path_that_is_not_utf8_is_not_mounted_itself() -> None:
    with pytest.raises(UserError, match="is not UTF-8") as caught:
        mounts.check([spec(os.fsdecode(b"/srv/caf\xe9"))])
    caught.value.message.encode()


def test_outer_folders_are_mounted_first() -> None:
    paths = ["/a/b/c", "/a-b", "/a", "/b", "/a/b", "/a b/c"]
    order = [one.guest_path for one in mounts.parents_first([spec(path) for path in paths])]
    assert sorted(order) == sorted(paths)
    for path in paths:
        for other in paths:
            if path != other and mounts.is_below(path, other):
                assert order.index(other) < order.index(path)


def test_a_number_is_that_of_the_guest_path() -> None:
    given = mounts.numbers([spec("/x", "/srv"), HOME])
    assert given == {"/srv": zlib.crc32(b"/srv"), "/home/me": zlib.crc32(b"/home/me")}


def test_of_two_paths_with_one_number_the_earlier_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib, "crc32", lambda data: 0xFFFFFFFF)
    first, second, third = (spec(path) for path in ("/b", "/a", "/c"))
    assert mounts.numbers([first, second, third]) == {"/b": 0xFFFFFFFF, "/a": 1, "/c": 2}
    assert mounts.numbers([first]) == {"/b": 0xFFFFFFFF}
    monkeypatch.setattr(zlib, "crc32", lambda data: 0)
    assert mounts.numbers([first]) == {"/b": 1}


def test_what_is_new_is_added_and_what_is_there_stays() -> None:
    change = mounts.compare(
        [HOME, spec("/gone"), spec("/same"), spec("/moved", "/m")],
        [
            spec("/new"),
            MountSpec("/home/me", "/home/me", read_only=True),
            spec("/same"),
            spec("/other", "/m"),
        ],
    )
    assert change.added == (spec("/new"),)
    assert change.later == ("/gone", "/home/me", "/m")


def test_a_folder_that_was_moved_is_another_one_if_that_is_known() -> None:
    here, there, unknown = (MountSpec("/srv/x", "/x", real_path=real) for real in ("/a", "/b", ""))
    for current, wanted in ((here, here), (here, unknown), (unknown, here), (unknown, unknown)):
        assert mounts.compare([current], [wanted]) == mounts.Change((), ())
    assert mounts.compare([here], [there]) == mounts.Change((), ("/x",))
    assert here == there
    assert len({here, there, unknown}) == 1


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a/", os.fsdecode(b"/srv/caf\xe9")])
def test_where_a_folder_really_is_is_a_plain_path_as_well(path: str) -> None:
    with pytest.raises(UserError):
        mounts.check([MountSpec("/srv/x", "/x", real_path=path)])
    mounts.check([MountSpec("/srv/x", "/x", real_path="/a/b")])


# --- where a path is -------------------------------------------------------------------------------


def same(path: str) -> str:
    return path


def test_a_path_of_the_guest_belongs_to_the_innermost_mount() -> None:
    inner = spec("/srv/x", "/home/me/x")
    assert mounts.holder([inner, HOME], "/home/me/x/y") == inner
    assert mounts.holder([HOME, inner], "/home/me/xy") == HOME
    assert mounts.holder([HOME, inner], "/home/meat") is None
    assert mounts.is_shared([HOME], "/home/me")
    assert not mounts.is_shared([HOME], "/home")
    assert not mounts.is_shared([], "/")


@pytest.mark.parametrize(
    ("path", "guest_path"),
    [
        ("/home/me", "/home/me"),
        ("/home/me/a/b", "/home/me/a/b"),
        ("/home/meat", None),
        ("/srv/data", "/data"),
        ("/srv/data/a", "/data/a"),
        ("/srv", None),
        # Something else is mounted where the home would have it, and it is mounted elsewhere.
        ("/home/me/cache/x", None),
        ("/var/x/y", "/home/me/cache/y"),
    ],
)
def test_a_folder_of_the_host_is_found_in_the_guest(path: str, guest_path: str | None) -> None:
    specs = [HOME, spec("/srv/data", "/data"), spec("/var/x", "/home/me/cache")]
    assert mounts.guest_path_of(specs, path, same) == guest_path
    found = mounts.share_of(specs, path, same)
    assert (found is None) == (guest_path is None)
    if found is not None:
        assert mounts.holder(specs, guest_path or "") == found


def test_of_nested_folders_the_one_that_can_be_seen_counts() -> None:
    specs = [spec("/home/me/work", "/work"), HOME]
    assert mounts.guest_path_of(specs, "/home/me/work/a", same) == "/work/a"
    assert mounts.guest_path_of([HOME, spec("/x", "/home/me/work")], "/x/a", same) == "/home/me/work/a"


def test_where_a_mount_is_was_found_when_it_was_chosen(machine: Path) -> None:
    (machine / "link").symlink_to("srv/data")
    was, now = f"{machine}/home/src", f"{machine}/srv/data"
    specs = [MountSpec(f"{machine}/link", "/src", real_path=was)]
    assert mounts.guest_path_of(specs, f"{was}/x") == "/src/x"
    assert mounts.share_of(specs, now) is None
    assert mounts.share_of(specs, f"{machine}/link") is None


# --- this machine ----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose user works in a home of their own."""
    root = Path(os.path.realpath(tmp_path))
    for folder in ("home/src", "home/.agentctl/instances", "srv/data"):
        (root / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.setenv("PWD", str(root / "home"))
    monkeypatch.chdir(root / "home")
    return root


def choose(machine: Path, *texts: str) -> list[MountSpec]:
    return list(mounts.chosen(texts, machine / "home/.agentctl"))


def test_folders_are_chosen_as_they_are_named(machine: Path) -> None:
    home = str(machine / "home")
    assert choose(machine, "~") == [spec(home)]
    assert choose(machine, ".", "~/src:/src:ro") == [spec(home), spec(f"{home}/src", "/src", read_only=True)]
    assert choose(machine, "src") == [spec(f"{home}/src")]
    assert choose(machine, "../srv//data/") == [spec(f"{machine}/srv/data")]
    assert choose(machine, "~", "~", home) == [spec(home)]
    assert choose(machine, "~:/a//b/") == [spec(home, "/a/b")]
    assert choose(machine, "none") == []


@pytest.mark.parametrize(
    ("text", "sentence", "hint"),
    [
        ("nowhere", "{home}/nowhere does not exist", "mkdir -p {home}/nowhere"),
        ("file", "{home}/file is not a folder", "mount the folder that it is in: {home}"),
        ("file/x", "{home}/file/x cannot be mounted: Not a directory", "ls -ld"),
        ("~nobody-at-all/x", "there is no user 'nobody-at-all'", "write the path"),
        ("/:/host", "/ cannot be mounted: it is this machine itself", ""),
        ("/proc:/p", "/proc cannot be mounted", ""),
        ("/dev/shm:/x", "/dev/shm cannot be mounted", ""),
        ("proc:/p", "{home}/proc cannot be mounted: it is this machine itself", ""),
        ("~/.agentctl", "{home}/.agentctl cannot be mounted: it is in agentctl's own folder", ""),
        ("~/.agentctl/instances:/x", "it is in agentctl's own folder", ""),
        ("~:/home", "/home cannot be a mount: /home is the VM's own", "--mount {home}:/mnt/home"),
        ("~:/a/../b", "'/b' is not", ""),
    ],
)
def test_what_cannot_be_mounted_is_refused(machine: Path, text: str, sentence: str, hint: str) -> None:
    home = machine / "home"
    (home / "file").touch()
    (home / "proc").symlink_to("/proc")
    if text == "~:/a/../b":
        assert choose(machine, text) == [spec(str(home), "/b")]
        return
    with pytest.raises(UserError) as caught:
        choose(machine, text)
    assert sentence.format(home=home) in caught.value.message
    assert hint.format(home=home) in caught.value.hint
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(machine: Path) -> None:
    (machine / "srv/data").chmod(0)
    with pytest.raises(UserError, match="you may not read it"):
        choose(machine, str(machine / "srv/data"))


def test_none_is_nothing_beside_others(machine: Path) -> None:
    with pytest.raises(UserError, match="none does not exist"):
        choose(machine, "none", "~")


def test_two_folders_at_one_place_are_refused(machine: Path) -> None:
    with pytest.raises(UserError, match="cannot both be"):
        choose(machine, "~", f"{machine}/srv:{machine}/home")


def test_a_symlink_inside_a_mount_leads_to_the_real_place(machine: Path) -> None:
    home, data = machine / "home", machine / "srv/data"
    (home / "link").symlink_to(data)
    (data / "sub").mkdir()
    # The guest's kernel follows the link to the real path, so that is where it must be.
    assert choose(machine, "~/link/sub", "~") == [spec(f"{home}/link/sub", f"{data}/sub"), spec(str(home))]
    (home / "inner").symlink_to("src")
    assert choose(machine, "~", "~/inner")[1] == spec(f"{home}/inner", f"{home}/src")


def test_a_symlink_outside_of_all_mounts_keeps_its_name(machine: Path) -> None:
    (machine / "alias").symlink_to("home")
    assert choose(machine, f"{machine}/alias/src") == [spec(f"{machine}/alias/src")]


def test_a_home_behind_a_symlink_keeps_its_name(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "users").symlink_to("home")
    monkeypatch.setenv("HOME", f"{machine}/users/")
    assert mounts.default() == (spec(f"{machine}/users"),)
    # Wherever the shell believes it is, that is in the home.
    for directory in (f"{machine}/home/src", f"{machine}/users/src"):
        assert mounts.guest_path_of(mounts.default(), directory) == f"{machine}/users/src"
        assert mounts.with_directory(mounts.default(), directory, machine / "p").specs == mounts.default()


@pytest.mark.parametrize("home", ["/", "/var/lib/docker", "/etc/x"])
def test_a_home_that_is_the_systems_is_not_mounted(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    assert mounts.default() == ()


def test_the_working_directory_is_added_when_it_is_outside(machine: Path) -> None:
    home, data = spec(f"{machine}/home"), f"{machine}/srv/data"
    private = machine / "home/.agentctl"
    added = mounts.with_directory((home,), data, private)
    assert added.specs == (home, spec(data))
    assert data in added.note
    assert not added.warning
    for inside in (f"{machine}/home", f"{machine}/home/src", None):
        assert mounts.with_directory((home,), inside, private) == mounts.WithDirectory((home,))


def test_what_a_symlink_of_a_mount_leads_to_is_not_added_by_itself(machine: Path) -> None:
    """The VM may have made the symlink."""
    home, data = spec(f"{machine}/home"), f"{machine}/srv/data"
    (machine / "home/link").symlink_to(data)
    outside = mounts.with_directory((home,), f"{machine}/home/link", machine / "p")
    assert outside.specs == (home,)
    assert data in outside.warning
    assert mounts.with_directory((home,), data, machine / "p").specs == (home, spec(data))


@pytest.mark.parametrize(
    ("directory", "why"),
    [
        ("/", "this machine itself"),
        ("/etc", "the VM's own"),
        ("/proc", "machine itself"),
        ("/usr", "VM's own"),
    ],
)
def test_a_working_directory_that_cannot_be_mounted_is_a_warning(directory: str, why: str) -> None:
    kept = mounts.with_directory((HOME,), directory, Path("/p"))
    assert kept.specs == (HOME,)
    assert kept.warning.startswith("the VM does not see this folder: ")
    assert why in kept.warning
    assert not kept.note


def test_a_working_directory_in_agentctls_own_folder_is_a_warning(machine: Path) -> None:
    private = machine / "home/.agentctl"
    assert "agentctl's own" in mounts.with_directory((), str(private / "instances"), private).warning


def test_where_folders_really_are_is_recorded_when_they_are_chosen(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"{machine}/srv/data"
    (machine / "link").symlink_to("srv/data")
    (machine / "users").symlink_to("home")
    (one, two) = choose(machine, f"{machine}/link:/src", data)
    assert (one.host_path, one.real_path) == (f"{machine}/link", data)
    assert (two.host_path, two.real_path) == (data, data)
    added = mounts.with_directory((), f"{machine}/link", machine / "p").specs
    assert [spec.real_path for spec in added] == [data]
    monkeypatch.setenv("HOME", f"{machine}/users")
    assert [spec.real_path for spec in mounts.default()] == [f"{machine}/home"]


def test_what_was_recorded_is_not_looked_up_again(machine: Path) -> None:
    (machine / "link").symlink_to("srv/data")
    old, recorded = MountSpec(f"{machine}/link", "/a"), MountSpec(f"{machine}/link", "/b", real_path="/x")
    assert [spec.real_path for spec in mounts.resolved([old, recorded])] == [f"{machine}/srv/data", "/x"]


def test_a_path_has_strayed_when_it_means_another_folder(machine: Path) -> None:
    (machine / "link").symlink_to("srv/data")
    (machine / "dangling").symlink_to("nowhere")
    link, data = f"{machine}/link", f"{machine}/srv/data"
    specs = [
        MountSpec(link, "/same", real_path=data),
        MountSpec(link, "/other", real_path=f"{machine}/home"),
        MountSpec(link, "/unknown"),
        MountSpec(f"{machine}/dangling", "/nothing", real_path=data),
        MountSpec(f"{machine}/gone", "/gone", real_path=data),
    ]
    assert mounts.strayed(specs) == {"/other": data}


def test_the_working_directory_is_called_as_the_shell_does(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "link").symlink_to("srv/data")
    monkeypatch.chdir(machine / "srv/data")
    monkeypatch.setenv("PWD", f"{machine}/link")
    assert mounts.here() == f"{machine}/link"
    for wrong in (f"{machine}/home", f"{machine}/nowhere", "relative", f"{machine}/srv/../link", ""):
        monkeypatch.setenv("PWD", wrong)
        assert mounts.here() == f"{machine}/srv/data"


def test_a_working_directory_that_was_deleted_is_none(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(machine / "home/src")
    (machine / "home/src").rmdir()
    assert mounts.here() is None
