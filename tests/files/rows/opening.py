"""open(2): every kind of thing with every sensible combination of flags; modes and umask; O_TMPFILE."""

from __future__ import annotations

import os
import socket
import stat
import time

from .table import attempt, in_child, link_descriptor, opened, read_file, row, rows, text, write_file

KINDS = (
    "missing",
    "file",
    "directory",
    "link",
    "dirlink",
    "dangling",
    "loop",
    "fifo",
    "file/",
    "file/below",
    "no/where",
)

FLAGS = {
    "RDONLY": os.O_RDONLY,
    "WRONLY": os.O_WRONLY,
    "RDWR": os.O_RDWR,
    "CREAT": os.O_WRONLY | os.O_CREAT,
    "CREAT EXCL": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "CREAT TRUNC": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "CREAT NOFOLLOW": os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW,
    "TRUNC": os.O_WRONLY | os.O_TRUNC,
    "APPEND": os.O_WRONLY | os.O_APPEND,
    "DIRECTORY": os.O_RDONLY | os.O_DIRECTORY,
    "DIRECTORY NOFOLLOW": os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW,
    "NOFOLLOW": os.O_RDONLY | os.O_NOFOLLOW,
    "PATH": os.O_PATH,
    "PATH NOFOLLOW": os.O_PATH | os.O_NOFOLLOW,
    "SYNC": os.O_RDWR | os.O_SYNC,
    "DSYNC": os.O_RDWR | os.O_DSYNC,
    "NOATIME": os.O_RDONLY | os.O_NOATIME,
}


def prepare(kind: str) -> None:
    """What ``kind`` needs: each name costs a dozen messages on the mount."""
    first = kind.split("/")[0]
    if first in ("file", "link"):
        write_file("file", b"content")
    if first in ("directory", "dirlink"):
        os.mkdir("directory")
    if first == "fifo":
        os.mkfifo("fifo")
    targets = {"link": "file", "dirlink": "directory", "dangling": "nowhere", "loop": "loop"}
    if first in targets:
        os.symlink(targets[first], first)


def kind_and_size(status: os.stat_result) -> str:
    kind = stat.filemode(status.st_mode)
    return f"{kind} {status.st_size}" if stat.S_ISREG(status.st_mode) else kind


@rows("open", [(f"{kind} {name}", kind, flags) for kind in KINDS for name, flags in FLAGS.items()])
def _open(kind: str, flags: int) -> object:
    prepare(kind)
    # A FIFO without its other end would wait.
    outcome = attempt(os.open, kind, flags | os.O_NONBLOCK, 0o640)
    if isinstance(outcome, int):
        fd, outcome = outcome, kind_and_size(os.fstat(outcome))
        os.close(fd)
    return [outcome, sorted(os.listdir()), attempt(lambda: kind_and_size(os.stat("file")))]


MODES = [0, 0o400, 0o444, 0o600, 0o644, 0o666, 0o755, 0o777, 0o4755, 0o2755, 0o1777, 0o6777]


@rows(
    "create with mode",
    [(f"{mode:o} umask {umask:o}", mode, umask) for mode in MODES for umask in (0, 0o22, 0o77)],
)
def _modes(mode: int, umask: int) -> object:
    os.umask(umask)
    try:
        with opened("file", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode) as fd:
            # Whatever the mode says, who made it may write now.
            written = os.write(fd, b"data")
        os.mkdir("directory", mode)
        os.mknod("node", stat.S_IFREG | mode)
        os.mkfifo("fifo", mode)
    finally:
        os.umask(0o22)
    return [written, *(oct(os.stat(name).st_mode) for name in ("file", "directory", "node", "fifo"))]


@row
def create_in_a_directory_with_setgid() -> object:
    os.mkdir("shared")
    os.chmod("shared", 0o2775)
    write_file("shared/file")
    os.mkdir("shared/below")
    return [oct(os.stat("shared/below").st_mode), os.stat("shared/file").st_gid == os.stat("shared").st_gid]


@row
def a_file_made_0444_is_written_through_its_descriptor_only() -> object:
    with opened("object", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444) as fd:
        os.write(fd, b"one")
        os.fchmod(fd, 0o400)
        os.write(fd, b"two")
        os.ftruncate(fd, 5)
    return [text("object"), oct(os.stat("object").st_mode)]


@row
def a_descriptor_outlives_its_permission() -> object:
    write_file("file", b"before")
    with opened("file") as fd:
        os.chmod("file", 0)
        os.pwrite(fd, b"after!", 0)
        return os.pread(fd, 10, 0).decode()


@row
def excl_of_a_dangling_link() -> object:
    os.symlink("target", "link")
    return [attempt(os.open, "link", os.O_CREAT | os.O_EXCL | os.O_WRONLY), os.path.lexists("target")]


@row
def create_through_a_dangling_link() -> object:
    os.symlink("target", "link")
    write_file("link", b"x")
    return [text("target"), os.path.islink("link")]


@row
def truncate_at_open_keeps_the_inode() -> object:
    write_file("file", b"content")
    before = os.stat("file").st_ino
    write_file("file", b"new")
    return [os.stat("file").st_ino == before, text("file")]


@row
def truncate_at_open_changes_mtime() -> object:
    write_file("file", b"content")
    os.utime("file", (1, 1))
    with opened("file", os.O_WRONLY | os.O_TRUNC):
        return abs(os.stat("file").st_mtime - time.time()) < 3600


@row
def open_with_an_invalid_access_mode() -> object:
    write_file("file")
    with opened("file", 3) as fd:  # Linux: neither read nor write
        return [attempt(os.read, fd, 1), attempt(os.write, fd, b"x")]


@row
def an_empty_name() -> object:
    return [attempt(os.open, "", os.O_RDONLY), attempt(os.stat, ""), attempt(os.mkdir, "")]


@row
def a_socket_is_not_opened() -> object:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return [attempt(os.open, "socket", os.O_RDONLY), stat.filemode(os.stat("socket").st_mode)]


@row
def tmpfile_has_no_name() -> object:
    with opened(".", os.O_TMPFILE | os.O_RDWR, 0o640) as fd:
        os.write(fd, b"hidden")
        status = os.fstat(fd)
        return [
            os.pread(fd, 10, 0).decode(),
            status.st_nlink,
            oct(status.st_mode),
            status.st_size,
            os.listdir(),
        ]


@row
def tmpfile_gets_a_name() -> object:
    with opened(".", os.O_TMPFILE | os.O_RDWR, 0o640) as fd:
        os.write(fd, b"first ")
        link_descriptor(fd, "named")
        os.write(fd, b"second")
        return [
            text("named"),
            os.stat("named").st_nlink,
            oct(os.stat("named").st_mode),
            os.fstat(fd).st_nlink,
        ]


@row
def tmpfile_with_excl_stays_unnamed() -> object:
    with opened(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL) as fd:
        return [attempt(link_descriptor, fd, "named"), os.listdir()]


@row
def tmpfile_does_not_replace() -> object:
    write_file("named", b"old")
    with opened(".", os.O_TMPFILE | os.O_RDWR) as fd:
        return [attempt(link_descriptor, fd, "named"), text("named")]


@row
def tmpfile_where_it_cannot_be() -> object:
    write_file("file")
    return [attempt(os.open, name, os.O_TMPFILE | os.O_RDWR) for name in ("file", "missing")] + [
        attempt(os.open, ".", os.O_TMPFILE | os.O_RDONLY)
    ]


@row
def open_by_descriptor_path() -> object:
    write_file("file", b"content")
    with opened("file", os.O_PATH) as fd:
        os.rename("file", "moved")
        return read_file(f"/proc/self/fd/{fd}").decode()


@row
def openat_below_a_moved_directory() -> object:
    os.mkdir("a")
    with opened("a", os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.rename("a", "b")
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        return [os.listdir("b"), os.listdir(fd)]


@row
def descriptors_are_shared_with_a_child() -> object:
    write_file("file", b"0123456789")
    with opened("file", os.O_RDONLY) as fd:
        child = in_child(lambda: os.read(fd, 4))
        return [repr(child), os.read(fd, 4).decode()]
