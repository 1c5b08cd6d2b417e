"""Directory streams: what they list, where they can be entered again, and what happens meanwhile."""

from __future__ import annotations

import ctypes
import os
import stat

from .table import LIBC, attempt, opened, row, rows, write_file

LIBC.opendir.restype = ctypes.c_void_p
LIBC.readdir.restype = ctypes.c_void_p
LIBC.telldir.restype = ctypes.c_long
LIBC.opendir.argtypes = [ctypes.c_char_p]
for _function in (LIBC.readdir, LIBC.telldir, LIBC.closedir, LIBC.rewinddir):
    _function.argtypes = [ctypes.c_void_p]
LIBC.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class Dirent(ctypes.Structure):
    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("off", ctypes.c_int64),
        ("reclen", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    )


class Stream:
    """readdir(3) and its friends, as libc has them."""

    def __init__(self, path: str) -> None:
        self._stream = LIBC.opendir(path.encode())
        if not self._stream:
            raise OSError(ctypes.get_errno(), "opendir")

    def next(self) -> bytes | None:
        entry = LIBC.readdir(self._stream)
        if not entry:
            return None
        return bytes(ctypes.cast(entry, ctypes.POINTER(Dirent)).contents.name)

    def rest(self) -> list[bytes]:
        return list(iter(self.next, None))

    def tell(self) -> int:
        return int(LIBC.telldir(self._stream))

    def seek(self, position: int) -> None:
        LIBC.seekdir(self._stream, position)

    def rewind(self) -> None:
        LIBC.rewinddir(self._stream)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        LIBC.closedir(self._stream)


def fill(count: int) -> set[bytes]:
    for index in range(count):
        write_file(f"name{index}")
    return {b"name%d" % index for index in range(count)} | {b".", b".."}


@row
def dot_and_dot_dot_are_listed() -> object:
    os.mkdir("directory")
    with Stream("directory") as empty:
        return sorted(name.decode() for name in empty.rest())


@rows("list", [(f"{count} names", count) for count in (0, 1, 2, 100, 300)])
def _list(count: int) -> object:
    names = fill(count)
    with Stream(".") as stream:
        listed = stream.rest()
        at_the_end = stream.next()
        stream.rewind()
        again = stream.rest()
    return [
        len(listed),
        set(listed) == names,
        len(set(listed)) == len(listed),
        at_the_end,
        sorted(again) == sorted(listed),
    ]


@row
def kinds_are_told() -> object:
    write_file("file")
    os.mkdir("directory")
    os.symlink("x", "link")
    os.mkfifo("fifo")
    os.mknod("socket", stat.S_IFSOCK | 0o600)
    found = {}
    for entry in os.scandir():
        mode = os.lstat(entry.name).st_mode
        told = (entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False), entry.is_symlink())
        found[entry.name] = told == (stat.S_ISREG(mode), stat.S_ISDIR(mode), stat.S_ISLNK(mode))
    return sorted(found.items())


@row
def inode_numbers_in_a_listing() -> object:
    fill(20)
    return all(entry.inode() == os.lstat(entry.name).st_ino for entry in os.scandir())


@row
def seek_back_to_every_position() -> object:
    fill(150)
    with Stream(".") as stream:
        positions, names = [], []
        while True:
            positions.append(stream.tell())
            if (name := stream.next()) is None:
                break
            names.append(name)
        right = 0
        for index in [*range(0, len(names), 7), len(names) - 1, 0]:
            stream.seek(positions[index])
            right += stream.rest() == names[index:]
        stream.seek(positions[-1])
        return [len(set(positions)) == len(positions), right, stream.next()]


@row
def a_position_survives_changes() -> object:
    fill(300)
    with Stream(".") as stream:
        first = [stream.next() for _ in range(150)]
        position = stream.tell()
        for index in range(0, 300, 5):
            if b"name%d" % index in first:
                os.unlink(f"name{index}")
        stream.seek(position)
        rest = stream.rest()
    return [len(first) + len(rest), len(set(first) | set(rest)), set(first) & set(rest) == set()]


@row
def a_listing_while_names_are_removed() -> object:
    """What rm -r does."""
    fill(300)
    removed = 0
    with Stream(".") as stream:
        while (name := stream.next()) is not None:
            if name not in (b".", b".."):
                os.unlink(name)
                removed += 1
    return [removed, os.listdir()]


@row
def a_listing_while_names_are_made() -> object:
    before = fill(200)
    seen = []
    with Stream(".") as stream:
        while (name := stream.next()) is not None:
            seen.append(name)
            if len(seen) <= 100:
                write_file(f"later{len(seen)}")
    # New names may be seen or not; the old ones are, and nothing is seen twice.
    return [before <= set(seen), len(set(seen)) == len(seen), len(os.listdir())]


@row
def rewinding_sees_what_is_new() -> object:
    fill(3)
    with Stream(".") as stream:
        stream.rest()
        write_file("new")
        os.unlink("name0")
        stream.rewind()
        return sorted(name.decode() for name in stream.rest())


@row
def two_streams_of_one_directory() -> object:
    names = fill(300)
    with Stream(".") as one, Stream(".") as two:
        first = [one.next() for _ in range(100)]
        all_of_two = two.rest()
        return [set(first) | set(one.rest()) == names, set(all_of_two) == names]


@row
def every_way_of_making_a_name_shows_at_once() -> object:
    listings = []
    write_file("file")
    os.mkdir("directory")
    os.symlink("x", "link")
    os.link("file", "hard")
    listings.append(sorted(os.listdir()))
    os.rename("file", "directory/moved")
    os.unlink("link")
    listings.append(sorted(os.listdir()))
    listings.append(os.listdir("directory"))
    return listings


@row
def a_directory_that_is_gone() -> object:
    os.mkdir("directory")
    with opened("directory", os.O_RDONLY) as fd:
        os.rmdir("directory")
        return [
            os.listdir(fd),
            attempt(os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=fd),
            attempt(os.mkdir, "new", dir_fd=fd),
            os.fstat(fd).st_nlink,
        ]


@row
def the_current_directory_is_gone() -> object:
    top = os.getcwd()
    os.mkdir("directory")
    os.chdir("directory")
    os.rmdir("../directory")
    outcomes = [
        attempt(os.getcwd),
        attempt(os.listdir),
        attempt(write_file, "new"),
        attempt(os.stat, "..") == "ENOENT",
    ]
    os.chdir(top)
    return outcomes


@row
def the_current_directory_moves() -> object:
    top = os.getcwd()
    os.makedirs("a/b")
    os.chdir("a/b")
    os.rename("../../a", "../../c")
    where = os.path.relpath(os.getcwd(), top)
    write_file("file")
    os.chdir(top)
    return [where, os.listdir("c/b")]


@row
def a_listing_without_permission() -> object:
    from .table import NOBODY, in_child

    os.mkdir("directory")
    os.chmod("directory", 0o311)
    user = NOBODY if os.geteuid() == 0 else None
    return in_child(lambda: os.listdir("directory"), user=user)


@row
def trees_are_walked_and_removed() -> object:
    import shutil

    for one in range(3):
        for two in range(3):
            os.makedirs(f"tree/{one}/{two}")
            for three in range(3):
                write_file(f"tree/{one}/{two}/{three}", b"%d" % three)
    walked = sum(len(directories) + len(files) for _, directories, files in os.walk("tree"))
    shutil.copytree("tree", "copy")
    os.rename("copy/2", "copy/0/9")
    copied = sum(len(directories) + len(files) for _, directories, files in os.walk("copy"))
    shutil.rmtree("tree")
    return [walked, copied, os.listdir()]


def a_very_large_directory(count: int) -> object:
    """Added by the script, which knows how large it is to be. With names this long, 500 are 128 KiB of a listing."""
    names = [f"{index:0250}" for index in range(count)]
    os.mkdir("directory")
    with opened("directory", os.O_RDONLY) as fd:
        for name in names:
            os.mknod(name, stat.S_IFREG | 0o644, dir_fd=fd)
    with Stream("directory") as stream:
        listed = stream.rest()
    whole = set(listed) == {name.encode() for name in names} | {b".", b".."}
    return [len(listed), whole, os.stat(f"directory/{names[-1]}").st_size]
