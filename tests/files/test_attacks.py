"""A guest that is not what it should be: nothing it says reaches beyond its shares, or ends the file server."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import random
import socket
import stat
import threading
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fileserver.confinement import VALID
from protocol import codec, files
from protocol.files import (
    ATTR,
    CALLS,
    ROOT,
    Allocate,
    CopyRange,
    Create,
    CreateUnnamed,
    FileCall,
    Forget,
    GetAttributes,
    GetXattr,
    List,
    ListXattr,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    OpenForLocks,
    Read,
    ReadLink,
    RemoveDirectory,
    RemoveXattr,
    Rename,
    Seek,
    SetAttributes,
    SetXattr,
    Sync,
    Unlink,
    Write,
)
from tests.files.peer import Peer, Refused, peer_of

SECRET = b"what-nobody-in-the-guest-may-see"
OPEN, SEALED = 7, 8  # two shares: one that may be written, one that is read-only
HOSTILE_NAMES = [
    b"..", b".", b"", b"/", b"a/b", b"../secret", b"../secret/data", b"/etc/passwd", b"x/../../secret/data",
    b"a\0b", b"\0", b"n" * 256, b"n" * 100_000, b"../" * 1000,
]  # fmt: skip
HOSTILE_NUMBERS = [-(2**63), -1, 0, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def tree_digest(top: Path) -> str:
    """Everything below ``top``: names, kinds, modes, sizes, content, targets."""
    lines = []
    for directory, directories, names in os.walk(top):
        for name in [*directories, *names]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content = ""
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            lines.append(f"{path} {status.st_mode} {status.st_mtime_ns} {status.st_nlink} {content}")
    return "\n".join(sorted(lines))


@dataclasses.dataclass
class Scene:
    peer: Peer
    top: Path

    @property
    def open(self) -> Path:
        return self.top / "open"

    @property
    def secret(self) -> Path:
        return self.top / "secret"

    def ask(self, call: FileCall[Any], payload: bytes = b"") -> int:
        """The errno; a session that is ended instead counts as EPROTO."""
        try:
            return self.peer.ask(call, payload).errno
        except Refused:
            return errno.EPROTO

    def unique(self) -> int:
        return self.peer.unique()


@pytest.fixture(scope="module")
def shared() -> Iterator[Scene]:
    with peer_of({OPEN: ("open", False), SEALED: ("sealed", True)}, SECRET, hide=["open/hidden"]) as (
        peer,
        top,
    ):
        yield Scene(peer, top)


@pytest.fixture
def scene(shared: Scene) -> Iterator[Scene]:
    """The shares with something in them, and next to them what is nobody's business. It is the same afterwards."""
    top = shared.top
    (top / "secret").mkdir()
    (top / "secret/data").write_bytes(SECRET * 10)
    (top / "secret/below").mkdir()
    for share in ("open", "sealed"):
        place = top / share
        (place / "file").write_bytes(b"public")
        (place / "directory/below").mkdir(parents=True)
        (place / "directory/data").write_bytes(b"public, too")
        (place / "out").symlink_to("../secret")
        (place / "link").symlink_to("../secret/data")
        (place / "absolute").symlink_to(top / "secret/data")
    (top / "open/hidden/private").write_bytes(SECRET)
    before, sealed = tree_digest(top / "secret"), tree_digest(top / "sealed")
    yield shared
    assert tree_digest(top / "secret") == before
    assert tree_digest(top / "sealed") == sealed
    assert sorted(os.listdir(top)) == ["open", "sealed", "secret"]
    assert (top / "open/hidden/private").read_bytes() == SECRET
    # It goes on serving.
    assert shared.peer.look_up(OPEN).node == ROOT
    (top / "open/alive").write_bytes(b"alive")
    assert shared.peer.look_up(OPEN, b"alive").node > ROOT
    clear(top)


def clear(top: Path) -> None:
    import shutil

    shutil.rmtree(top / "secret")
    for share in ("open", "sealed"):
        for path in (top / share).iterdir():
            if path.name == "hidden":
                (path / "private").unlink()
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def calls_with_name(
    share: int, node: int, name: bytes, unique: Callable[[], int], target: int
) -> list[FileCall[Any]]:
    """Every call that takes a name, in every place where it takes one."""
    return [
        Lookup(share, unique(), node, name),
        MakeNode(share, unique(), node, name, stat.S_IFREG | 0o644),
        MakeDirectory(share, unique(), node, name, 0o755),
        MakeSymlink(share, unique(), node, name, b"x"),
        MakeLink(share, unique(), target, node, name),
        Create(share, unique(), node, name, 0o644, os.O_WRONLY | os.O_TRUNC),
        Create(share, unique(), node, name, 0o644, os.O_RDWR | os.O_CREAT),
        Unlink(share, unique(), node, name),
        RemoveDirectory(share, unique(), node, name),
        Rename(share, unique(), node, name, node, b"stolen"),
        Rename(share, unique(), node, b"file", node, name),
        Rename(share, unique(), node, b"file", node, name, 2),
    ]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: repr(name[:20]))
def test_names_that_are_no_names(scene: Scene, name: bytes) -> None:
    target = scene.peer.look_up(OPEN, b"file").node
    for directory in ((), (b"directory",)):
        node = scene.peer.look_up(OPEN, *directory).node
        for call in calls_with_name(OPEN, node, name, scene.unique, target):
            assert scene.ask(call) in (errno.EINVAL, errno.ENAMETOOLONG, errno.ENOENT, errno.EPROTO), call
    assert scene.open.joinpath("file").read_bytes() == b"public"
    assert not scene.open.joinpath("stolen").exists()


def calls_of_node(share: int, node: int, unique: Callable[[], int]) -> list[tuple[FileCall[Any], bytes]]:
    """Every call that does something with a node, by itself."""
    return [
        (Lookup(share, unique(), node, b"data"), b""),
        (List(share, unique(), node, 1, 0), b""),
        (List(share, unique(), node, 2, 0, True), b""),
        (Read(share, unique(), node, 0, 4096), b""),
        (Write(share, unique(), node, 0), b"overwritten"),
        (Write(share, unique(), node, 0, True), b"appended"),
        (SetAttributes(share, unique(), node, files.SET_SIZE, size=0), b""),
        (Allocate(share, unique(), node, 0, 0, 100_000), b""),
        (CopyRange(share, unique(), node, 0, node, 4096, 16), b""),
        (Seek(share, unique(), node, 0, 3), b""),
        (SetXattr(share, unique(), node, b"user.planted", b"x"), b""),
        (Create(share, unique(), node, b"planted", 0o644, os.O_RDWR), b""),
        (CreateUnnamed(share, unique(), node, 0o644, os.O_RDWR), b""),
        (MakeNode(share, unique(), node, b"planted", stat.S_IFREG | 0o644), b""),
        (MakeDirectory(share, unique(), node, b"planted", 0o755), b""),
        (MakeSymlink(share, unique(), node, b"planted", b"x"), b""),
        (Unlink(share, unique(), node, b"data"), b""),
        (RemoveDirectory(share, unique(), node, b"below"), b""),
        (Rename(share, unique(), node, b"data", ROOT, b"stolen"), b""),
        (OpenForLocks(share, unique(), node, os.O_RDWR), b""),
        (OpenForLocks(share, unique(), node, os.O_RDWR | os.O_TRUNC | os.O_CREAT), b""),
    ]


@pytest.mark.parametrize("name", [b"out", b"link", b"absolute"])
def test_a_symlink_is_never_followed(scene: Scene, name: bytes) -> None:
    entry = scene.peer.look_up(OPEN, name)
    assert stat.S_ISLNK(ATTR.unpack(entry.attr)[9])
    for call, payload in calls_of_node(OPEN, entry.node, scene.unique):
        assert scene.ask(call, payload) != 0, call
    # Its own mode and owner, or nothing's: never its target's.
    for valid in (
        files.SET_MODE,
        files.SET_UID | files.SET_GID,
        files.SET_ATIME | files.SET_MTIME,
        files.SET_MTIME_NOW,
    ):
        scene.ask(
            SetAttributes(OPEN, scene.unique(), entry.node, valid, mode=0o777, uid=1, gid=1, mtime_ns=1)
        )
    status = scene.secret.joinpath("data").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o644, 0, 0)
    for flags in (os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL):
        assert scene.ask(Create(OPEN, scene.unique(), ROOT, name, 0o644, flags)) != 0
    assert scene.open.joinpath(name.decode()).is_symlink()


def test_a_hard_link_to_a_symlink_is_one_of_the_symlink(scene: Scene) -> None:
    entry = scene.peer.look_up(OPEN, b"link")
    scene.ask(MakeLink(OPEN, scene.unique(), entry.node, ROOT, b"second"))
    assert scene.secret.joinpath("data").stat().st_nlink == 1
    assert not scene.open.joinpath("second").exists() or scene.open.joinpath("second").is_symlink()


@contextlib.contextmanager
def flipping(one: Path, other: Path) -> Iterator[None]:
    """Somebody on the host swaps two names, as fast as can be, for 2 s at least."""
    import ctypes

    over = threading.Event()
    exchange = ctypes.CDLL(None).renameat2

    def flip() -> None:
        while not over.is_set():
            exchange(-100, os.fsencode(one), -100, os.fsencode(other), 2)
            time.sleep(0)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


RACE_SECONDS = 2.0


def test_a_directory_that_turns_into_a_symlink(scene: Scene) -> None:
    (scene.open / "flip").mkdir()
    (scene.open / "flip/data").write_bytes(b"public")
    (scene.open / "flop").symlink_to("../secret")
    (scene.open / "bait").write_bytes(b"bait")
    deadline, read, rounds = time.monotonic() + RACE_SECONDS, 0, 0
    with flipping(scene.open / "flip", scene.open / "flop"):
        while time.monotonic() < deadline:
            rounds += 1
            reply = scene.peer.ask(Lookup(OPEN, scene.unique(), ROOT, b"flip"))
            if reply.errno:
                continue
            node = reply.value.node
            for call in (
                Create(OPEN, scene.unique(), node, b"planted", 0o644, os.O_RDWR),
                MakeDirectory(OPEN, scene.unique(), node, b"planted too", 0o755),
                Unlink(OPEN, scene.unique(), node, b"planted"),
                RemoveDirectory(OPEN, scene.unique(), node, b"planted too"),
                RemoveDirectory(OPEN, scene.unique(), node, b"below"),
                Rename(OPEN, scene.unique(), ROOT, b"bait", node, b"data"),
                List(OPEN, scene.unique(), node, 5, 0, True),
            ):
                scene.ask(call)
            reply = scene.peer.ask(Lookup(OPEN, scene.unique(), node, b"data"))
            if not reply.errno:
                read += scene.peer.ask(Read(OPEN, scene.unique(), reply.value.node, 0, 100)).errno == 0
                scene.ask(Write(OPEN, scene.unique(), reply.value.node, 0), b"overwritten")
    assert rounds > 20
    assert read > 0


def test_a_file_that_turns_into_a_symlink(scene: Scene) -> None:
    (scene.open / "flip").write_bytes(b"public")
    (scene.open / "flop").symlink_to("../secret/data")
    deadline, done = time.monotonic() + RACE_SECONDS, 0
    with flipping(scene.open / "flip", scene.open / "flop"):
        while time.monotonic() < deadline:
            reply = scene.peer.ask(Lookup(OPEN, scene.unique(), ROOT, b"flip"))
            if not reply.errno:
                node = reply.value.node
                scene.ask(Read(OPEN, scene.unique(), node, 0, 4096))
                done += scene.ask(Write(OPEN, scene.unique(), node, 0), b"written") == 0
                scene.ask(SetAttributes(OPEN, scene.unique(), node, files.SET_SIZE, size=3))
                scene.ask(SetAttributes(OPEN, scene.unique(), node, files.SET_MODE, mode=0o777))
                scene.ask(SetXattr(OPEN, scene.unique(), node, b"user.planted", b"x"))
            scene.ask(Create(OPEN, scene.unique(), ROOT, b"flip", 0o644, os.O_RDWR | os.O_TRUNC))
    assert done > 0


def test_a_parent_that_moves_out_of_the_share(scene: Scene) -> None:
    """Its node may go on meaning it, but nothing in it is to be had, or made, and the way up does not lead anywhere."""
    (scene.open / "moving/below").mkdir(parents=True)
    (scene.open / "moving/below/file").write_bytes(b"public")
    node = scene.peer.look_up(OPEN, b"moving", b"below").node
    before = (scene.secret / "below").stat().st_mtime_ns
    (scene.open / "moving").rename(scene.top / "secret/below/moved")
    deadline = time.monotonic() + 10 * VALID
    while not scene.ask(Lookup(OPEN, scene.unique(), node, b"file")):
        assert time.monotonic() < deadline
    assert scene.ask(List(OPEN, scene.unique(), node, 1, 0)) == errno.ESTALE
    assert scene.ask(Create(OPEN, scene.unique(), node, b"new", 0o644, os.O_RDWR)) == errno.ESTALE
    assert scene.ask(Rename(OPEN, scene.unique(), node, b"file", ROOT, b"taken")) == errno.ESTALE
    for name in (b"..", b"../data", b"../../data"):
        assert scene.ask(Lookup(OPEN, scene.unique(), node, name)) != 0
    (scene.top / "secret/below/moved").rename(scene.open / "moving")
    assert scene.ask(Lookup(OPEN, scene.unique(), node, b"file")) == 0
    os.utime(scene.secret / "below", ns=(before, before))


FORGED = [0, -1, 123456789, 2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1, 2**64 - 1, -(2**63)]


@pytest.mark.parametrize("node", FORGED)
def test_nodes_that_were_never_given(scene: Scene, node: int) -> None:
    for call, payload in calls_of_node(OPEN, node, scene.unique):
        assert scene.ask(call, payload) != 0, call
    for call in (
        GetAttributes(OPEN, scene.unique(), node),
        ReadLink(OPEN, scene.unique(), node),
        MakeLink(OPEN, scene.unique(), node, ROOT, b"planted"),
        MakeLink(OPEN, scene.unique(), scene.peer.look_up(OPEN, b"file").node, node, b"planted"),
        Sync(OPEN, scene.unique(), node),
        ListXattr(OPEN, scene.unique(), node),
    ):
        assert scene.ask(call) != 0, call
    scene.ask(Forget(OPEN, 0, 0, [node], [1]))
    assert not scene.open.joinpath("planted").exists()


@pytest.mark.parametrize("share", [0, -1, 9, 2**32, 2**64 - 1])
def test_shares_that_do_not_exist(scene: Scene, share: int) -> None:
    for node in (ROOT, scene.peer.look_up(OPEN, b"file").node):
        for call, payload in calls_of_node(share, node, scene.unique):
            assert scene.ask(call, payload) != 0, call


def test_a_node_of_another_share(scene: Scene) -> None:
    """A file of the read-only share is not to be had through the one that may be written."""
    node = scene.peer.look_up(SEALED, b"file").node
    directory = scene.peer.look_up(SEALED, b"directory").node
    ours = {scene.peer.look_up(OPEN, name).node for name in (b"file", b"directory")}
    for number in {node, directory} - ours:
        for call, payload in calls_of_node(OPEN, number, scene.unique):
            scene.ask(call, payload)
        scene.ask(MakeLink(OPEN, scene.unique(), number, ROOT, b"stolen"))
        scene.ask(Rename(OPEN, scene.unique(), number, b"data", ROOT, b"stolen"))
        scene.ask(CopyRange(OPEN, scene.unique(), scene.peer.look_up(OPEN, b"file").node, 0, number, 0, 10))
    assert scene.top.joinpath("sealed/file").read_bytes() == b"public"
    assert not scene.open.joinpath("stolen").exists()


def test_handles_that_were_never_given(scene: Scene) -> None:
    node = scene.peer.look_up(OPEN, b"file").node
    for handle in HOSTILE_NUMBERS:
        for call in (
            files.SetLock(OPEN, scene.unique(), node, handle, 1, 0, 10, 1),
            files.SetLock(OPEN, scene.unique(), node, handle, 1, 0, 10, 1, True),
            files.TestLock(OPEN, scene.unique(), node, handle, 1, 0, 10, 1),
        ):
            assert scene.ask(call) != 0, call
        scene.ask(files.Release(OPEN, scene.unique(), node, handle, 1))
        scene.ask(files.ReleaseOwner(OPEN, scene.unique(), node, handle, 1))


def test_devices_are_neither_made_nor_opened(scene: Scene) -> None:
    for kind, number in (
        (stat.S_IFCHR, 0),
        (stat.S_IFBLK, 0),
        (stat.S_IFDIR, 0),
        (stat.S_IFLNK, 0),
        (0o150000, 1),
    ):
        assert scene.ask(MakeNode(OPEN, scene.unique(), ROOT, b"device", kind | 0o666)) != 0, number
    assert not os.path.lexists(scene.open / "device")
    os.mknod(scene.open / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(scene.open / "block", stat.S_IFBLK | 0o666, os.makedev(7, 200))
    os.mkfifo(scene.open / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(scene.open / "socket"))
    for name in (b"zero", b"block", b"fifo", b"socket"):
        entry = scene.peer.look_up(OPEN, name)
        before = time.monotonic()
        for call, payload in (
            (Read(OPEN, scene.unique(), entry.node, 0, 100), b""),
            (Write(OPEN, scene.unique(), entry.node, 0), b"x"),
            (Allocate(OPEN, scene.unique(), entry.node, 0, 0, 10), b""),
            (SetAttributes(OPEN, scene.unique(), entry.node, files.SET_SIZE, size=0), b""),
            (Seek(OPEN, scene.unique(), entry.node, 0, 3), b""),
            (
                CopyRange(OPEN, scene.unique(), entry.node, 0, scene.peer.look_up(OPEN, b"file").node, 0, 10),
                b"",
            ),
            (Create(OPEN, scene.unique(), ROOT, name, 0o644, os.O_RDWR), b""),
            (OpenForLocks(OPEN, scene.unique(), entry.node, os.O_RDWR), b""),
            (List(OPEN, scene.unique(), entry.node, 1, 0), b""),
        ):
            assert scene.ask(call, payload) != 0, (name, call)
        assert time.monotonic() - before < 5  # a FIFO is not waited for
        assert scene.ask(GetAttributes(OPEN, scene.unique(), entry.node)) == 0


def numbers_in(call: type[FileCall[Any]]) -> list[str]:
    hints = typing.get_type_hints(call)
    return [field.name for field in dataclasses.fields(call) if hints[field.name] is int]  # type: ignore[arg-type]


def sample(cls: type[FileCall[Any]], scene: Scene, **changes: Any) -> FileCall[Any]:
    """A call about a file that is there to be spoilt, or about the root, with some fields forged."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kinds = {int: 0, bytes: b"victim", bool: False}
        values[field.name] = kinds.get(hints[field.name], [])
    node = scene.peer.look_up(OPEN, b"victim").node if "name" not in values else ROOT
    values.update(share=OPEN, unique=scene.unique(), node=node)
    if cls is List:
        values["node"] = ROOT
    return cls(**{**values, **changes})


@pytest.mark.parametrize("cls", CALLS.values(), ids=lambda cls: cls.__name__)
def test_numbers_of_every_size(scene: Scene, cls: type[FileCall[Any]]) -> None:
    for name in numbers_in(cls):
        for number in HOSTILE_NUMBERS:
            (scene.open / "victim").write_bytes(b"victim")
            call = sample(cls, scene, **{name: number})
            assert 0 <= scene.ask(call, b"x" * 100 if cls is Write else b"") < 200, call
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                (scene.open / "victim").unlink()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (scene.open / "victim").rmdir()


ODD: list[Any] = [None, True, -1, 2**63, 1.5, "text", b"bytes", [], [1], {}, {"a": "b"}, [[[[]]]]]


@pytest.mark.parametrize("op", [*CALLS, 0, -1, 9, 999, 2**40])
def test_arguments_of_every_shape(scene: Scene, op: int) -> None:
    dice = random.Random(op)
    shapes: list[Any] = [
        *ODD,
        [None] * 8,
        [OPEN],
        [OPEN, 2],
        [OPEN, 2, ROOT],
        [OPEN, 2, ROOT, b"x"] + [b""] * 90,
    ]
    for _ in range(30):
        shapes.append(
            [OPEN, scene.unique(), dice.choice([ROOT, 5, *ODD]), *dice.choices(ODD, k=dice.randrange(8))]
        )
    ended = 0
    for args in shapes:
        try:
            result = scene.peer.raw(op, args, b"payload")
        except Refused:
            ended += 1
        else:
            assert result.errno != 0 or op in CALLS
    assert ended <= len(shapes)
    for path in scene.open.iterdir():
        if path.name not in ("file", "directory", "out", "link", "absolute", "hidden"):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_forgetting_more_than_there_is(scene: Scene) -> None:
    node = scene.peer.look_up(OPEN, b"file").node
    for nodes, counts in (
        ([ROOT] * 1000, [2**62] * 1000),
        ([ROOT, node], [1]),
        ([node], [-5]),
        ([node], [2**63 - 1]),
        ([node, node, node], [1, 1, 1]),
        (list(range(2000)), [1] * 2000),
    ):
        scene.ask(Forget(OPEN, 0, 0, nodes, counts))
    assert scene.ask(GetAttributes(OPEN, scene.unique(), ROOT)) == 0
    assert scene.peer.look_up(OPEN, b"file").node > ROOT


def test_attributes_and_xattrs_beyond_the_share(scene: Scene) -> None:
    node = scene.peer.look_up(OPEN, b"file").node
    for name in (
        b"trusted.x",
        b"security.capability",
        b"security.selinux",
        b"system.posix_acl_access",
        b"user.",
        b"x",
        b"",
        b"user.a\0b",
        b"user." + b"n" * 300,
    ):
        for call in (
            SetXattr(OPEN, scene.unique(), node, name, b"x"),
            GetXattr(OPEN, scene.unique(), node, name),
            RemoveXattr(OPEN, scene.unique(), node, name),
        ):
            assert scene.ask(call) != 0, call
    assert scene.ask(SetXattr(OPEN, scene.unique(), node, b"user.big", bytes(200_000))) != 0
    assert os.listxattr(scene.open / "file") == []


SIZES = files.MAX_DATA


def test_payloads_where_there_are_none_and_sizes_beyond_all(scene: Scene) -> None:
    node = scene.peer.look_up(OPEN, b"file").node
    (scene.open / "victim").write_bytes(b"victim")
    for cls in CALLS.values():
        if cls is not Write and not cls.CHANGES:
            scene.ask(
                sample(cls, scene, **({"node": ROOT} if "name" in numbers_in(cls) else {"node": node})),
                bytes(SIZES),
            )
    reply = scene.peer.ask(Read(OPEN, scene.unique(), node, 0, 2**31))
    assert reply.errno != 0 or reply.payload == b"public"
    assert scene.ask(SetAttributes(OPEN, scene.unique(), node, files.SET_SIZE, size=2**62)) != 0
    assert scene.ask(Write(OPEN, scene.unique(), node, 2**63 - 10), bytes(100)) != 0
    assert (scene.open / "file").read_bytes() == b"public"


def changing_calls(scene: Scene, share: int) -> list[tuple[FileCall[Any], bytes]]:
    peer, unique = scene.peer, scene.unique
    node, directory = peer.look_up(share, b"file").node, peer.look_up(share, b"directory").node
    calls = [*calls_of_node(share, node, unique), *calls_of_node(share, directory, unique)]
    calls += [(call, b"") for call in calls_with_name(share, ROOT, b"new", unique, node)]
    calls += [(call, b"") for call in calls_with_name(share, ROOT, b"file", unique, node)]
    for valid in (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048, 0xFFFF):
        calls.append((SetAttributes(share, unique(), node, valid, mode=0o777, uid=1, gid=1, size=0), b""))
    calls.append((RemoveXattr(share, unique(), node, b"user.x"), b""))
    changing = [pair for pair in calls if pair[0].CHANGES and not isinstance(pair[0], OpenForLocks)]
    assert {type(call) for call, _ in changing} >= {
        cls for cls in CALLS.values() if cls.CHANGES and cls.OP < 40 and cls is not Forget
    }
    return changing


def test_read_only_is_the_hosts_to_keep(scene: Scene) -> None:
    os.setxattr(scene.top / "sealed/file", "user.x", b"x")
    for call, payload in changing_calls(scene, SEALED):
        assert scene.ask(call, payload) == errno.EROFS, call
    node = scene.peer.look_up(SEALED, b"file").node
    scene.ask(OpenForLocks(SEALED, scene.unique(), node, os.O_RDWR | os.O_TRUNC | os.O_CREAT))
    opened = scene.peer.look_up(OPEN, b"file").node
    scene.ask(CopyRange(SEALED, scene.unique(), opened, 0, node, 0, 6))
    scene.ask(Rename(SEALED, scene.unique(), ROOT, b"file", opened, b"x"))


def test_what_is_hidden_stays_hidden(scene: Scene) -> None:
    node = scene.peer.look_up(OPEN, b"hidden").node
    listing = scene.peer.ask(List(OPEN, scene.unique(), node, 1, 0))
    assert listing.errno != 0 or listing.payload == b""
    assert scene.ask(Lookup(OPEN, scene.unique(), node, b"private")) == errno.EACCES
    for call in calls_with_name(OPEN, node, b"private", scene.unique, scene.peer.look_up(OPEN, b"file").node):
        assert scene.ask(call) != 0, call
    for call in (
        Rename(OPEN, scene.unique(), ROOT, b"hidden", ROOT, b"found"),
        Rename(OPEN, scene.unique(), ROOT, b"directory", ROOT, b"hidden", 2),
        RemoveDirectory(OPEN, scene.unique(), ROOT, b"hidden"),
        SetAttributes(OPEN, scene.unique(), node, files.SET_MODE, mode=0o777),
    ):
        scene.ask(call)
    hidden = list(scene.open.rglob("private"))
    assert len(hidden) == 1
    if hidden[0].parent.name != "hidden":  # moved as a whole: still shut
        name = hidden[0].parent.name.encode()
        moved = scene.peer.look_up(OPEN, name).node
        assert scene.ask(Lookup(OPEN, scene.unique(), moved, b"private")) == errno.EACCES
        hidden[0].parent.rename(scene.open / "hidden")


def test_one_unique_for_different_calls(scene: Scene) -> None:
    """An outcome is kept for the same question; another one under its number gets none that is not its own."""
    node = scene.peer.look_up(SEALED, b"file").node
    unique = scene.unique()
    assert scene.ask(MakeDirectory(OPEN, unique, ROOT, b"first", 0o755)) == 0
    reply = scene.peer.ask(MakeDirectory(OPEN, unique, ROOT, b"first", 0o755))
    assert reply.errno == 0  # asked again
    assert reply.value.node == scene.peer.look_up(OPEN, b"first").node
    scene.ask(MakeDirectory(OPEN, unique, ROOT, b"second", 0o755))
    assert scene.ask(MakeDirectory(SEALED, unique, ROOT, b"first", 0o755)) == errno.EROFS
    scene.ask(Write(OPEN, unique, node, 0), b"x")
    scene.ask(Unlink(OPEN, unique, ROOT, b"file"))
    for name in ("first", "second"):
        with contextlib.suppress(FileNotFoundError):
            (scene.open / name).rmdir()


def test_as_many_large_reads_as_one_may_ask_for(scene: Scene) -> None:
    """A gigabyte of answers, asked for at once: it comes, and is never all in memory."""
    (scene.open / "large").write_bytes(bytes(files.MAX_DATA))
    node = scene.peer.look_up(OPEN, b"large").node
    replies = scene.peer.ask_many([(Read(OPEN, scene.unique(), node, 0, files.MAX_DATA), b"")] * 1000)
    assert all(reply.errno == 0 and len(reply.payload) == files.MAX_DATA for reply in replies)
    status = Path(f"/proc/{scene.peer.server.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 400 * 1024, f"{peak} KiB"


def test_more_calls_than_are_allowed(scene: Scene) -> None:
    """The session ends, and the next one is served."""
    calls = [(GetAttributes(OPEN, 0, ROOT), b"")] * 1000
    assert all(reply.errno == 0 for reply in scene.peer.ask_many(calls))
    link = scene.peer._link
    assert link is not None
    session = link._live()
    sessions = scene.peer.sessions

    async def flood() -> None:
        arguments = codec.encode(List(OPEN, 0, ROOT, 1, 0))
        for _ in range(5000):
            session._called.clear()
            link._calling[session.call(List.OP, arguments)] = lambda outcome: None
        link._flush()

    with contextlib.suppress(Exception):
        scene.peer._loop.call(flood)
    deadline = time.monotonic() + 20
    while scene.peer.sessions == sessions and time.monotonic() < deadline:
        time.sleep(0.02)
    assert scene.ask(GetAttributes(OPEN, scene.unique(), ROOT)) == 0


def test_a_hello_of_another_shape_and_bytes_of_none(scene: Scene) -> None:
    sessions = scene.peer.sessions
    link = scene.peer._link
    assert link is not None

    async def spoil() -> None:
        with contextlib.suppress(Exception):
            await link._transport.send_all(b"\xff" * 1000)

    scene.peer._loop.call(spoil)
    deadline = time.monotonic() + 20
    while scene.peer.sessions == sessions and time.monotonic() < deadline:
        time.sleep(0.02)
    assert scene.peer.sessions > sessions
