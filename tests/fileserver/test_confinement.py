"""A guest that speaks the protocol directly and wants out, in, or more than it may."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from protocol.files import (
    CALLS,
    ROOT,
    SET_MODE,
    Create,
    FileCall,
    Forget,
    GetAttributes,
    GetXattr,
    List,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    Read,
    RemoveDirectory,
    Rename,
    SetAttributes,
    SetXattr,
    Unlink,
    Write,
)
from tests.fileserver.served import Served, attr, refused, serving

HOSTILE = [
    b"..",
    b".",
    b"",
    b"/",
    b"/etc/passwd",
    b"a/b",
    b"../x",
    b"d/..",
    b"a\0b",
    b"\0",
    b"/proc/self/root",
]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("SECRET")
    return secret


@pytest.fixture
def share(tmp_path: Path, outside: Path) -> Iterator[Served]:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "f").write_text("f")
    with serving(root) as share:
        yield share


def by_name(share: Served, name: bytes) -> list[FileCall[Any]]:
    """Every call that takes a name, with this one."""
    node, directory = share.node("f"), share.node("d")
    return [
        share.call(Lookup, ROOT, name),
        share.call(MakeNode, ROOT, name, 0o644),
        share.call(MakeDirectory, ROOT, name, 0o755),
        share.call(MakeSymlink, ROOT, name, b"x"),
        share.call(MakeLink, node, ROOT, name),
        share.call(Create, ROOT, name, 0o644, os.O_RDWR),
        share.call(Unlink, ROOT, name),
        share.call(RemoveDirectory, ROOT, name),
        share.call(Rename, ROOT, name, directory, b"x"),
        share.call(Rename, ROOT, b"f", directory, name),
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_one_component(share: Served, name: bytes) -> None:
    for call in by_name(share, name):
        assert refused(lambda call=call: share.tree.perform(call)) == "EINVAL", call
    assert sorted(os.listdir(share.path)) == ["d", "f"]


@pytest.mark.parametrize("length", [256, 5000, 1 << 20])
def test_names_that_are_too_long(share: Served, length: int) -> None:
    for call in by_name(share, b"n" * length):
        assert refused(lambda call=call: share.tree.perform(call)) == "ENAMETOOLONG", call


@pytest.mark.parametrize("target", ["secret", "absolute", "key"])
def test_symlinks_lead_nowhere(share: Served, outside: Path, target: str) -> None:
    where = {"secret": Path("../secret"), "absolute": outside, "key": outside / "key"}[target]
    (share.path / "out").symlink_to(where)
    link = share.node("out")
    assert stat.S_ISLNK(attr(share.ask(GetAttributes, link)).mode)
    assert share.refused(Lookup, link, b"key") == "ENOTDIR"
    assert share.refused(List, link, 1, 0) == "ENOTDIR"
    assert share.refused(MakeDirectory, link, b"x", 0o755) == "ENOTDIR"
    assert share.refused(Create, link, b"x", 0o644, os.O_RDWR) == "ENOTDIR"
    assert share.refused(Rename, ROOT, b"f", link, b"f") == "ENOTDIR"
    assert share.refused(Read, link, 0, 100) == "ENXIO"
    assert share.refused(Write, link, 0) == "ENXIO"
    assert share.refused(SetAttributes, link, SET_MODE, mode=0o777) in ("ENOTSUP", "EOPNOTSUPP")
    assert share.refused(SetXattr, link, b"user.a", b"x") == "EPERM"
    assert share.refused(GetXattr, link, b"user.a") in ("ENODATA", "EPERM")
    assert os.listdir(outside) == ["key"]
    assert (outside / "key").stat().st_mode & 0o777 != 0o777


def test_a_symlink_swapped_in_while_walking(tmp_path: Path, outside: Path) -> None:
    """A program of the host (or another guest's) exchanges a directory and a symlink out of the share all the time."""
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d" / "key").write_text("inside")
    (root / "out").symlink_to(outside)
    descriptor = os.open(root, os.O_RDONLY)
    stopped = threading.Event()
    with serving(root, max_descriptors=1) as share:
        swapper = threading.Thread(target=_swap, args=(descriptor, stopped))
        swapper.start()
        try:
            answers = {_attempt(share) for _ in range(1500)}
        finally:
            stopped.set()
            swapper.join()
    os.close(descriptor)
    assert b"inside" in answers
    assert answers <= {b"inside", "ENOTDIR", "ESTALE", "ENOENT"}
    assert (outside / "key").read_text() == "SECRET"


def _swap(root: int, stopped: threading.Event) -> None:
    from fileserver import linux

    while not stopped.is_set():
        linux.renameat2(root, b"d", root, b"out", linux.RENAME_EXCHANGE)


def _attempt(share: Served) -> bytes | str:
    found: list[bytes] = []

    def read() -> None:
        node = share.node("d/key")
        found.append(share.bytes(Read, node, 0, 100))

    error = refused(read)
    return found[0] if found else error


def test_devices_are_seen_and_never_opened(share: Served, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes devices")
    try:
        os.mknod(share.path / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no devices in this sandbox")
    node = share.node("zero")
    found = attr(share.ask(GetAttributes, node))
    assert (stat.S_ISCHR(found.mode), found.rdev) == (True, 1 << 8 | 5)
    assert share.refused(Read, node, 0, 100) == "ENXIO"
    assert share.refused(Write, node, 0) == "ENXIO"
    assert share.refused(Create, ROOT, b"zero", 0o666, os.O_RDWR) == "ESTALE"
    share.ask(Unlink, ROOT, b"zero")


def test_the_kernels_files_are_out_of_reach() -> None:
    """A chroot(2) below a share with /proc mounted in it: the memory of this very process would be a file there."""
    with serving(Path("/")) as share:
        assert share.refused(Lookup, ROOT, b"proc") == "EACCES"
        assert share.refused(Lookup, ROOT, b"sys") == "EACCES"
    with serving(Path("/proc")) as share:
        assert share.refused(Lookup, ROOT, b"self") != "0"


def test_forged_nodes(share: Served, outside: Path) -> None:
    inode = os.stat(outside / "key").st_ino
    for number in (0, -1, 2, inode, 1 << 63, 1 << 200):
        for kind, arguments in ((GetAttributes, ()), (Read, (0, 1)), (List, (1, 0)), (Lookup, (b"f",))):
            assert share.refused(kind, number, *arguments) == "ESTALE"


def test_forged_counts(share: Served) -> None:
    node = share.node("f")
    for nodes, counts in (([node], []), ([], [1]), ([node, node], [1])):
        assert share.refused(Forget, 0, nodes, counts) == "EINVAL"
    share.ask(Forget, 0, [ROOT, 0, -5, 1 << 70, node], [1 << 62, 1, 1, 1, -1])
    assert share.ask(GetAttributes, node)
    assert share.ask(GetAttributes, ROOT)


def test_a_mode_is_only_a_mode(share: Served) -> None:
    share.ask(Create, ROOT, b"new", 0xFFFFFFFF, os.O_RDWR | os.O_DIRECTORY | os.O_PATH)
    assert stat.S_ISREG(os.lstat(share.path / "new").st_mode)
    assert share.refused(MakeNode, ROOT, b"x", 0xFFFFFFFF) == "EINVAL"


# --- read-only ------------------------------------------------------------------------------------------


def example(kind: type[FileCall[Any]], node: int) -> FileCall[Any]:
    """A call with plausible fields, that would do something."""
    values: dict[str, Any] = {
        "share": 1, "unique": 7, "node": node, "name": b"new", "mode": 0o644, "target": b"x", "parent": ROOT,
        "new_name": b"new2", "flags": os.O_RDWR, "valid": SET_MODE, "value": b"x", "offset": 0, "length": 10,
        "to_node": node, "to_offset": 100, "nodes": [], "counts": [],
    }  # fmt: skip
    arguments = {field.name: values.get(field.name, 0) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**arguments)


CHANGES = [kind for kind in CALLS.values() if kind.CHANGES and kind is not Forget and kind.OP < 40]


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["f", "d"])
def test_nothing_is_changed_on_a_read_only_share(
    tmp_path: Path, kind: type[FileCall[Any]], name: str
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("f")
    with serving(tmp_path, read_only=True) as share:
        call = example(kind, share.node(name))
        before = _everything(tmp_path)
        assert refused(lambda: share.tree.perform(call, b"payload")) == "EROFS"
        assert refused(lambda: share.tree.perform_again(call, b"payload", b"precondition")) == "EROFS"
        share.tree.precondition(call)
        assert _everything(tmp_path) == before


def test_a_read_only_share_is_readable_and_forgets(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("f")
    with serving(tmp_path, read_only=True) as share:
        node = share.node("f")
        assert share.bytes(Read, node, 0, 9) == b"f"
        assert share.names(ROOT) == [b"f"]
        share.forget(node)
        assert share.refused(Read, node, 0, 9) == "ESTALE"


def _everything(path: Path) -> list[tuple[str, int, int, int]]:
    found = [path, *sorted(path.rglob("*"))]
    return [(str(one), (s := one.lstat()).st_ino, s.st_ctime_ns, s.st_mode) for one in found]


# --- sealed ---------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Served]:
    secret = tmp_path / "home" / "secret"
    (secret / "deep").mkdir(parents=True)
    (secret / "key").write_text("SECRET")
    (tmp_path / "f").write_text("f")
    with serving(tmp_path, hidden=[secret]) as share:
        yield share


def test_a_sealed_directory_is_empty_and_cannot_be_entered(sealed: Served) -> None:
    secret, file = sealed.node("home/secret"), sealed.node("f")
    assert stat.S_ISDIR(attr(sealed.ask(GetAttributes, secret)).mode)
    assert sealed.names(secret) == []
    attempts: list[Callable[[], object]] = [
        lambda: sealed.ask(Lookup, secret, b"key"),
        lambda: sealed.ask(Create, secret, b"new", 0o644, os.O_RDWR),
        lambda: sealed.ask(MakeDirectory, secret, b"new", 0o755),
        lambda: sealed.ask(MakeLink, file, secret, b"new"),
        lambda: sealed.ask(Unlink, secret, b"key"),
        lambda: sealed.ask(RemoveDirectory, secret, b"deep"),
        lambda: sealed.ask(Rename, secret, b"key", ROOT, b"stolen"),
        lambda: sealed.ask(Rename, ROOT, b"f", secret, b"f"),
        lambda: sealed.ask(SetAttributes, secret, SET_MODE, mode=0o777),
        lambda: sealed.ask(SetXattr, secret, b"user.a", b"x"),
    ]
    assert [refused(attempt) for attempt in attempts] == ["EACCES"] * len(attempts)
    assert sorted(os.listdir(sealed.path / "home" / "secret")) == ["deep", "key"]


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_a_sealed_directory_is_not_moved_or_removed(sealed: Served, flags: int) -> None:
    home = sealed.node("home")
    (sealed.path / "d").mkdir()
    assert sealed.refused(Rename, home, b"secret", ROOT, b"other", flags) == "EACCES"
    assert sealed.refused(Rename, ROOT, b"d", home, b"secret", flags) == "EACCES"
    assert sealed.refused(RemoveDirectory, home, b"secret") == "EACCES"


def test_a_sealed_directory_stays_sealed_wherever_it_is_moved(sealed: Served) -> None:
    sealed.node("home/secret")
    os.rename(sealed.path / "home", sealed.path / "house")
    assert sealed.names(sealed.node("house/secret")) == []
    os.rename(sealed.path / "house" / "secret", sealed.path / "moved")
    assert sealed.refused(Lookup, sealed.node("moved"), b"key") == "EACCES"


def test_what_a_guest_knew_before_it_was_sealed(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("SECRET")
    with serving(tmp_path) as share:
        node = share.node("secret/key")
        share.options["hidden"] = [tmp_path / "secret"]
        share.restart()
        assert share.refused(Read, node, 0, 100) == "EACCES"


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Served]:
    """The host finds its secrets through a symlink of the user's, two directories down."""
    (tmp_path / "share" / "data" / "deep" / "secret").mkdir(parents=True)
    (tmp_path / "share" / "home").mkdir()
    (tmp_path / "share" / "home" / "way").symlink_to("../data/deep")
    (tmp_path / "share" / "planted" / "secret").mkdir(parents=True)
    with serving(tmp_path / "share", hidden=[str(tmp_path / "share" / "home" / "way" / "secret")]) as share:
        yield share


HELD = [("", b"data"), ("data", b"deep"), ("", b"home"), ("home", b"way")]


@pytest.mark.parametrize("flags", [0, 1, 2])
@pytest.mark.parametrize(("parent", "name"), HELD)
def test_what_leads_to_a_sealed_directory_is_not_moved_or_replaced(
    nested: Served, parent: str, name: bytes, flags: int
) -> None:
    directory = nested.node(parent) if parent else ROOT
    (nested.path / "empty").mkdir()
    before = _names_below(nested.path)
    assert nested.refused(Rename, directory, name, ROOT, b"away", flags) == "EBUSY"
    assert nested.refused(Rename, directory, name, directory, b"aside", flags) == "EBUSY"
    for other in (b"planted", b"empty"):
        assert nested.refused(Rename, ROOT, other, directory, name, flags) == "EBUSY"
    assert nested.refused(RemoveDirectory, directory, name) == "EBUSY"
    assert nested.refused(Unlink, directory, name) == "EBUSY"
    assert _names_below(nested.path) == before


def _names_below(path: Path) -> list[tuple[str, int]]:
    return sorted((str(one), one.lstat().st_ino) for one in path.rglob("*"))


def test_a_symlink_on_the_way_is_not_replaced_under_another_name(nested: Served) -> None:
    """A second name of it is the same file, so that is held as well; the first still leads where it did."""
    nested.ask(MakeLink, nested.node("home/way"), ROOT, b"also")
    nested.ask(MakeSymlink, ROOT, b"mine", b"planted")
    assert nested.refused(Rename, ROOT, b"mine", ROOT, b"also") == "EBUSY"
    assert nested.refused(Create, nested.node("home"), b"way", 0o644, os.O_RDWR) == "ESTALE"
    assert os.readlink(nested.path / "home" / "way") == "../data/deep"


def test_what_is_beside_the_way_is_the_guests(nested: Served) -> None:
    data = nested.node("data")
    nested.ask(MakeDirectory, data, b"other", 0o755)
    nested.ask(Rename, data, b"other", ROOT, b"moved")
    nested.ask(RemoveDirectory, ROOT, b"moved")
    nested.ask(Rename, ROOT, b"planted", data, b"planted")
    assert sorted(os.listdir(nested.path)) == ["data", "home"]


def test_what_leads_there_is_held_in_every_share_that_has_it(nested: Served) -> None:
    with serving(nested.path / "data", hidden=[nested.path / "home/way/secret"]) as inner:
        assert inner.refused(Rename, ROOT, b"deep", ROOT, b"away") == "EBUSY"
        assert inner.names(inner.node("deep/secret")) == []


def test_a_root_that_comes_later_has_its_secrets_sealed(tmp_path: Path) -> None:
    """A home that is mounted after the server has started, and another one in its place."""
    root = tmp_path / "root"
    with serving(root, hidden=[root / "way" / "secret"]) as share:
        for _ in range(2):
            (root / "way" / "secret").mkdir(parents=True)
            (root / "way" / "secret" / "key").touch()
            share.tree.check_root()
            secret = share.node("way/secret")
            assert share.names(secret) == []
            assert share.refused(Lookup, secret, b"key") == "EACCES"
            assert share.refused(Rename, ROOT, b"way", ROOT, b"away") == "EBUSY"
            root.rename(tmp_path / f"old-{secret}")
            share.tree.check_root()


def test_what_was_restored_below_a_missing_root_is_sealed_when_it_comes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "secret").mkdir(parents=True)
    (root / "secret" / "key").write_text("SECRET")
    with serving(root) as share:
        key, secret = share.node("secret/key"), share.node("secret")
        root.rename(tmp_path / "away")
        share.options["hidden"] = [root / "secret"]
        share.restart()
        (tmp_path / "away").rename(root)
        share.tree.check_root()
        assert share.refused(Read, key, 0, 100) == "EACCES"
        assert share.names(secret) == []
