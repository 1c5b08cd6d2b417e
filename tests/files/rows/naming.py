"""Names: link, unlink, rename in every combination of kinds, symlinks and loops, and what a name may be."""

from __future__ import annotations

import os
import socket
import stat

from .table import attempt, opened, renameat2, row, rows, text, write_file

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


def make(kind: str, name: str) -> None:
    """Something of ``kind`` that can be told from others of it."""
    match kind:
        case "file":
            write_file(name, name.encode())
        case "empty":
            os.mkdir(name)
        case "full":
            os.mkdir(name)
            write_file(f"{name}/inside", name.encode())
        case "link":
            os.symlink(f"target of {name}", name)
        case "fifo":
            os.mkfifo(name)
        case "twin":
            os.link("source", name)


def seen(name: str) -> object:
    """What is there, down to what tells it from another."""
    try:
        mode = os.lstat(name).st_mode
    except OSError as error:
        return attempt(os.lstat, name) if error else None
    if stat.S_ISDIR(mode):
        return ["directory", *(text(f"{name}/{inside}") for inside in os.listdir(name))]
    if stat.S_ISLNK(mode):
        return ["link", os.readlink(name)]
    return ["file", text(name), os.lstat(name).st_nlink] if stat.S_ISREG(mode) else [stat.filemode(mode)]


RENAMES = [
    (f"{source} over {target}{suffix}", source, target, flags)
    for flags, suffix in ((0, ""), (NOREPLACE, " NOREPLACE"), (EXCHANGE, " EXCHANGE"))
    for source in ("missing", "file", "empty", "full", "link", "fifo")
    for target in ("missing", "file", "empty", "full", "link", "twin")
    if (source, target) not in (("missing", "twin"), ("empty", "twin"), ("full", "twin"))
]


@rows("rename", RENAMES)
def _rename(source: str, target: str, flags: int) -> object:
    make(source, "source")
    make(target, "target")
    before = {attempt(lambda name=name: os.lstat(name).st_ino): name for name in ("source", "target")}
    outcome = attempt(renameat2, "source", "target", flags)
    # Which of the two each name means now: not only something alike.
    after = [before.get(attempt(lambda name=name: os.lstat(name).st_ino)) for name in ("source", "target")]
    return [outcome, seen("source"), seen("target"), after]


@rows("rename between directories", [(kind, kind) for kind in ("file", "full", "link", "fifo")])
def _rename_across(kind: str) -> object:
    os.mkdir("a")
    os.mkdir("b")
    make(kind, "a/thing")
    os.rename("a/thing", "b/moved")
    return [os.listdir("a"), seen("b/moved"), os.stat("a").st_nlink, os.stat("b").st_nlink]


@row
def exchange_between_directories() -> object:
    os.mkdir("a")
    os.mkdir("b")
    make("full", "a/x")
    make("file", "b/y")
    renameat2("a/x", "b/y", EXCHANGE)
    return [seen("a/x"), seen("b/y"), os.stat("a").st_nlink, os.stat("b").st_nlink]


@row
def rename_with_odd_flags() -> object:
    write_file("file")
    return [
        attempt(renameat2, "file", "other", flags) for flags in (8, NOREPLACE | EXCHANGE, EXCHANGE | WHITEOUT)
    ]


@row
def rename_into_itself() -> object:
    os.makedirs("a/b")
    outcomes = [
        attempt(os.rename, *pair) for pair in (("a", "a/b/c"), ("a", "a/b"), ("a/b", "a"), ("a", "a"))
    ]
    return [*outcomes, seen("a/b")]


@row
def rename_of_dots_and_slashes() -> object:
    os.mkdir("a")
    write_file("file")
    pairs = (
        ("a/.", "b"),
        ("a/..", "b"),
        (".", "b"),
        ("a", "a/."),
        ("a", "b/"),
        ("file", "c/"),
        ("file/", "c"),
    )
    return [[attempt(os.rename, *pair) for pair in pairs], sorted(os.listdir())]


@row
def rename_changes_ctime_and_keeps_mtime() -> object:
    write_file("file")
    os.utime("file", (1, 1))
    inode = os.stat("file").st_ino
    os.rename("file", "moved")
    status = os.stat("moved")
    return [status.st_mtime, status.st_ctime > 1, status.st_ino == inode]


@row
def rename_a_directory_under_an_open_file() -> object:
    os.makedirs("a/deep")
    write_file("a/deep/file", b"content")
    with opened("a/deep/file") as fd:
        os.rename("a", "b")
        os.pwrite(fd, b"CON", 0)
    return [text("b/deep/file"), attempt(os.stat, "a")]


@rows(
    "unlink",
    [
        (kind, kind)
        for kind in ("missing", "file", "empty", "full", "link", "fifo", "socket", "file/", "..", ".")
    ],
)
def _unlink(kind: str) -> object:
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("thing")
    else:
        make(kind.rstrip("/"), "thing")
    name = kind if kind.startswith(".") else "thing/" if kind == "file/" else "thing"
    return [attempt(os.unlink, name), sorted(os.listdir())]


@rows(
    "rmdir",
    [(kind, kind) for kind in ("missing", "file", "empty", "full", "link", "fifo", "dirlink", "..", ".")],
)
def _rmdir(kind: str) -> object:
    if kind == "dirlink":
        os.mkdir("directory")
        os.symlink("directory", "thing")
    make(kind, "thing")
    return [attempt(os.rmdir, kind if kind.startswith(".") else "thing"), sorted(os.listdir())]


MAKERS = {
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "symlink": lambda name: os.symlink("x", name),
    "link": lambda name: os.link("original", name),
    "mknod": lambda name: os.mknod(name, stat.S_IFREG | 0o644),
}
PLACES = ("missing", "file", "empty", "link", "file/below", "missing/below", "fifo/below", "trailing/")


@rows("make", [(f"{maker} at {place}", maker, place) for maker in MAKERS for place in PLACES])
def _make(maker: str, place: str) -> object:
    write_file("original", b"original")
    for kind in ("file", "empty", "link", "fifo"):
        make(kind, kind)
    return [attempt(MAKERS[maker], place), os.path.lexists(place), os.stat("original").st_nlink]


@row
def hard_links_are_one_file() -> object:
    write_file("a", b"first")
    os.mkdir("d")
    os.link("a", "d/b")
    same = os.stat("a").st_ino == os.stat("d/b").st_ino
    write_file("d/b", b"second")
    os.chmod("a", 0o600)
    seen_by_other = [text("a"), oct(os.stat("d/b").st_mode), os.stat("a").st_nlink]
    os.unlink("a")
    return [same, *seen_by_other, os.stat("d/b").st_nlink, text("d/b")]


@row
def hard_links_of_other_things() -> object:
    for kind in ("empty", "link", "fifo"):
        make(kind, kind)
    outcomes = [
        attempt(os.link, kind, f"{kind}2", follow_symlinks=False)
        for kind in ("empty", "link", "fifo", "missing")
    ]
    return [*outcomes, seen("link2"), os.lstat("link").st_nlink]


@row
def sixty_hard_links() -> object:
    write_file("file", b"content")
    for index in range(60):
        os.link("file", f"link{index}")
    count = os.stat("link59").st_nlink
    for index in range(0, 60, 2):
        os.unlink(f"link{index}")
    return [count, os.stat("file").st_nlink, text("link7")]


@row
def a_hard_link_changes_ctime() -> object:
    write_file("file")
    os.utime("file", (1, 1))
    before = os.stat("file").st_ctime_ns
    import time

    time.sleep(0.02)
    os.link("file", "other")
    return [os.stat("file").st_ctime_ns > before, os.stat("file").st_mtime]


# --- symlinks --------------------------------------------------------------------------------------


@row
def symlinks_say_what_they_were_told() -> object:
    targets = [
        "a",
        "/",
        "../..",
        "./x/../y",
        "with space",
        "x" * 255,
        "y/" * 1000,
        "é",
        "\udcff",
        "/proc/self/root",
    ]
    for index, target in enumerate(targets):
        os.symlink(target, f"link{index}")
    return [
        [os.readlink(f"link{index}") == target for index, target in enumerate(targets)],
        [
            os.lstat(f"link{index}").st_size == len(os.fsencode(target))
            for index, target in enumerate(targets)
        ],
        [oct(os.lstat(f"link{index}").st_mode) for index in range(2)],
    ]


@row
def a_symlink_of_the_greatest_length() -> object:
    os.symlink("x" * 4095, "long")
    return [
        len(os.readlink("long")),
        attempt(os.symlink, "x" * 4096, "longer"),
        attempt(os.symlink, "", "empty"),
    ]


@row
def readlink_of_what_is_none() -> object:
    write_file("file")
    os.mkdir("directory")
    return [attempt(os.readlink, name) for name in ("file", "directory", "missing", "file/x")]


@row
def symlinks_are_followed() -> object:
    os.makedirs("a/b")
    write_file("a/b/file", b"content")
    os.symlink("a", "one")
    os.symlink("one/b", "two")
    os.symlink("../file", "a/b/up")
    os.symlink(os.path.abspath("a/b/file"), "absolute")
    return [text("two/file"), text("absolute"), attempt(os.stat, "two/up"), os.path.realpath("two/file")[-8:]]


@row
def loops_of_symlinks() -> object:
    os.symlink("b", "a")
    os.symlink("a", "b")
    os.symlink("self/x", "self")
    return [
        attempt(call, name) for call in (os.stat, os.listdir, os.mkdir, os.rmdir) for name in ("a", "self")
    ]


@rows("a chain of", [(f"{count} symlinks", count) for count in (1, 39, 40, 41)])
def _chain(count: int) -> object:
    write_file("link0", b"end")
    for index in range(1, count + 1):
        os.symlink(f"link{index - 1}", f"link{index}")
    return attempt(text, f"link{count}")


@row
def a_symlink_that_is_replaced_is_read_anew() -> object:
    write_file("one", b"one")
    write_file("two", b"two")
    os.symlink("one", "link")
    before = [os.readlink("link"), text("link")]
    os.symlink("two", "new")
    os.rename("new", "link")
    after = [os.readlink("link"), text("link")]
    os.unlink("link")
    os.symlink("one", "link")
    return [before, after, text("link")]


@row
def a_name_that_is_made_again_as_something_else() -> object:
    kinds = []
    for kind in ("file", "empty", "link", "fifo", "file"):
        make(kind, "thing")
        kinds.append(seen("thing"))
        os.rmdir("thing") if kind == "empty" else os.unlink("thing")
        kinds.append(os.path.lexists("thing"))
    return kinds


# --- what a name may be ----------------------------------------------------------------------------


@rows("a name of", [(f"{size} bytes", size) for size in (1, 254, 255, 256, 4096)])
def _lengths(size: int) -> object:
    name = "n" * size
    write_file("file", b"x")
    calls = [
        lambda: write_file(name, b"content"),
        lambda: text(name),
        lambda: os.rename(name, "m" * size),
        lambda: os.mkdir(name),
        lambda: os.rmdir(name),
        lambda: os.symlink("x", name),
        lambda: os.unlink(name),
        lambda: os.link("file", name),
        lambda: os.lstat(name) and None,
    ]
    return [*(attempt(call) for call in calls), sorted(map(len, os.listdir()))]


@row
def names_of_every_byte() -> object:
    legal = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    for name in legal:
        write_file(name, name)
    return [sorted(os.listdir(b".")) == legal, all(text(name).encode("latin-1") == name for name in legal)]


@row
def names_that_are_not_utf_8() -> object:
    names = sorted(
        [b"\xff\xfe", b"caf\xe9", "café".encode(), "cafe\u0301".encode(), b"new\nline", b" ", b"-rf", b"..."]
    )
    for name in names:
        os.mkdir(name)
    listed = sorted(os.listdir(b".")) == names
    for name in names:
        os.rename(name, name + b"\xf0")
    return [listed, sorted(os.listdir(b".")) == sorted(name + b"\xf0" for name in names)]


@row
def case_matters() -> object:
    write_file("File", b"upper")
    write_file("file", b"lower")
    return [sorted(os.listdir()), text("File"), text("file")]


@row
def a_path_that_is_too_long() -> object:
    deep = "/".join(["d" * 200] * 30)
    return [
        attempt(os.stat, deep),
        attempt(os.mkdir, deep),
        attempt(os.stat, "./" * 2047 + "x"),
        attempt(os.stat, "./" * 2048),
    ]


@row
def a_tree_deeper_than_a_path() -> object:
    top = os.getcwd()
    for _ in range(30):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    write_file("bottom", b"deep")
    content = text("bottom")
    os.unlink("bottom")
    for _ in range(30):
        os.chdir("..")
        os.rmdir("d" * 200)
    return [content, os.getcwd() == top, attempt(os.stat, os.path.join(*["d" * 200] * 15))]


@row
def devices_are_not_made() -> object:
    return [attempt(os.mknod, "null", stat.S_IFCHR | 0o666, os.makedev(1, 3)), os.path.lexists("null")]


@row
def the_whiteout_of_overlayfs() -> object:
    return [attempt(os.mknod, "gone", stat.S_IFCHR, 0), os.path.lexists("gone")]
