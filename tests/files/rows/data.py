"""Content: reading and writing, sizes, holes, mappings, copies, and files whose name is gone."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random

from .table import (
    NOBODY,
    Helper,
    attempt,
    checked,
    fallocate,
    in_child,
    opened,
    read_file,
    row,
    rows,
    text,
    write_file,
)

PAGE = 4096
MIB = 1 << 20
CREATE = os.O_RDWR | os.O_CREAT


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@row
def read_around_the_end() -> object:
    write_file("file", b"0123456789")
    with opened("file") as fd:
        return [os.pread(fd, 100, offset).decode() for offset in (0, 5, 9, 10, 11, 1 << 40)]


@row
def write_past_the_end_leaves_zeros() -> object:
    write_file("file", b"ab")
    with opened("file") as fd:
        os.pwrite(fd, b"z", 10_000)
    data = read_file("file")
    return [len(data), data.count(0), data[:2].decode(), data[-1:].decode()]


@row
def vectors() -> object:
    with opened("file", CREATE) as fd:
        written = [os.writev(fd, [b"ab", b"", b"cdef"]), os.pwritev(fd, [b"X", b"YZ"], 2)]
        parts = [bytearray(3), bytearray(10)]
        os.lseek(fd, 0, os.SEEK_SET)
        count = os.readv(fd, parts)
        return [*written, count, parts[0].decode(), bytes(parts[1][:3]).decode(), os.preadv(fd, parts, 4)]


@row
def append_ignores_the_position() -> object:
    write_file("file", b"one")
    with opened("file", os.O_RDWR | os.O_APPEND) as fd:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
        os.pwrite(fd, b"three", 0)  # Linux appends here too: pwrite(2), BUGS
        os.ftruncate(fd, 4)
        os.write(fd, b"!")
        return [text("file"), os.lseek(fd, 0, os.SEEK_CUR)]


@row
def two_appenders_in_turn() -> object:
    with opened("file", CREATE | os.O_APPEND) as one, opened("file", os.O_WRONLY | os.O_APPEND) as two:
        for index in range(50):
            os.write(one if index % 2 else two, b"%d," % index)
    return text("file")


@row
def many_processes_append() -> object:
    write_file("file")

    def append(letter: bytes) -> None:
        with opened("file", os.O_WRONLY | os.O_APPEND) as fd:
            for _ in range(60):
                os.write(fd, letter * 40 + b"\n")

    children = [Helper(lambda step, letter=letter: append(letter)) for letter in (b"a", b"b", b"c")]
    statuses = [child.end() for child in children]
    lines = read_file("file").splitlines()
    return [
        statuses,
        len(lines),
        sorted({line.decode() for line in lines}),
        all(lines.count(x) == 60 for x in lines),
    ]


@row
def descriptors_that_may_not() -> object:
    write_file("file", b"data")
    with opened("file", os.O_RDONLY) as fd:
        reader = [attempt(os.write, fd, b"x"), attempt(os.ftruncate, fd, 0), attempt(fallocate, fd, 0, 0, 10)]
    with opened("file", os.O_WRONLY) as fd:
        writer = [attempt(os.read, fd, 1)]
    with opened("file", os.O_PATH) as fd:
        path = [
            attempt(os.read, fd, 1),
            attempt(os.ftruncate, fd, 0),
            attempt(os.fchmod, fd, 0),
            attempt(os.fsync, fd),
        ]
    with opened(".", os.O_RDONLY) as fd:
        directory = [attempt(os.read, fd, 1), attempt(os.ftruncate, fd, 0), attempt(os.write, fd, b"x")]
    return [reader, writer, path, directory]


@row
def seeking() -> object:
    write_file("file", b"0123456789")
    with opened("file") as fd:
        steps = [
            (2, os.SEEK_SET),
            (3, os.SEEK_CUR),
            (-1, os.SEEK_END),
            (5, os.SEEK_END),
            (-1, os.SEEK_SET),
            (0, 9),
        ]
        return [attempt(os.lseek, fd, *step) for step in steps]


@rows(
    "a file of",
    [(f"{size} bytes", size) for size in (0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB + 7)],
)
def _sizes(size: int) -> object:
    data = noise(size)
    write_file("file", data)
    return [os.stat("file").st_size, digest(read_file("file")) == digest(data)]


@row
def small_writes_anywhere() -> object:
    model, dice = bytearray(200_000), random.Random(5)
    with opened("file", CREATE) as fd:
        os.ftruncate(fd, len(model))
        for _ in range(150):
            offset, size = dice.randrange(190_000), dice.randrange(1, 9000)
            data = dice.randbytes(size)
            os.pwrite(fd, data, offset)
            model[offset : offset + size] = data
            model.extend(bytes(max(0, offset + size - len(model))))
        os.ftruncate(fd, len(model))
    return read_file("file") == model


@rows("truncate to", [(str(size), size) for size in (0, 1, 5, 10, 4096, 5000, MIB, -1)])
def _truncate(size: int) -> object:
    write_file("file", b"0123456789")
    by_name = attempt(os.truncate, "file", size)
    with opened("file") as fd:
        by_descriptor = attempt(os.ftruncate, fd, size)
    data = read_file("file")
    return [by_name, by_descriptor, len(data), data.rstrip(b"\0").decode()]


@row
def truncate_of_what_is_no_file() -> object:
    os.mkdir("directory")
    os.mkfifo("fifo")
    os.symlink("nowhere", "dangling")
    return [attempt(os.truncate, name, 0) for name in ("directory", "fifo", "missing", "dangling", "fifo/x")]


@row
def shrinking_and_growing_reads_zeros() -> object:
    write_file("file", b"x" * 10_000)
    os.truncate("file", 100)
    os.truncate("file", 10_000)
    data = read_file("file")
    return [len(data), data.count(b"x"), data[100:].count(0)]


@row
def the_tail_of_a_shrunk_page_is_zero() -> object:
    write_file("file", b"x" * PAGE)
    with opened("file") as fd, mmap.mmap(fd, PAGE) as view:
        os.ftruncate(fd, 10)
        os.ftruncate(fd, PAGE)
        return [view[9], view[10], view[PAGE - 1]]


@row
def no_more_than_the_limit_of_a_process() -> object:
    import resource
    import signal

    def write() -> object:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with opened("file", CREATE) as fd:
            return [os.write(fd, b"x" * 2000), attempt(os.write, fd, b"x"), attempt(os.ftruncate, fd, 2000)]

    return in_child(write)


@row
def a_file_that_is_too_big() -> object:
    with opened("file", CREATE) as fd:
        most = 2**63 - 1
        return [
            attempt(os.pwrite, fd, b"xy", most),
            attempt(os.pread, fd, 1, most),
            attempt(os.pwrite, fd, b"x", -1),
        ]


@row
def a_sparse_terabyte() -> object:
    size = 1 << 40
    with opened("file", CREATE) as fd:
        os.ftruncate(fd, size)
        os.pwrite(fd, b"end", size - 3)
        status = os.fstat(fd)
        return [
            status.st_size == size,
            status.st_blocks < 10_000,
            os.pread(fd, 10, size - 3).decode(),
            os.pread(fd, 5, size // 2).hex(),
            os.lseek(fd, 0, os.SEEK_HOLE),
            os.lseek(fd, 0, os.SEEK_DATA) >= size - 64 * 1024,
        ]


# --- mappings --------------------------------------------------------------------------------------


@row
def a_shared_mapping_is_the_file() -> object:
    write_file("file", b"a" * 3 * PAGE)
    with opened("file") as fd, mmap.mmap(fd, 3 * PAGE) as view:
        view[PAGE : PAGE + 5] = b"store"
        by_read = os.pread(fd, 5, PAGE).decode()
        os.pwrite(fd, b"write", 2 * PAGE)
        by_view = view[2 * PAGE : 2 * PAGE + 5].decode()
        view.flush()
    return [by_read, by_view, digest(read_file("file"))]


@row
def a_shared_mapping_between_processes() -> object:
    write_file("file", bytes(PAGE))
    with opened("file") as fd, mmap.mmap(fd, PAGE) as view:

        def store() -> object:
            with opened("file") as other, mmap.mmap(other, PAGE) as theirs:
                theirs[0:5] = b"child"
            return "stored"

        return [in_child(store), view[:5].decode()]


@row
def a_shared_mapping_outlives_its_descriptor() -> object:
    write_file("file", bytes(PAGE))
    with opened("file") as fd:
        view = mmap.mmap(fd, PAGE)
    view[:4] = b"late"
    view.close()
    return text("file")[:4]


@row
def a_shared_mapping_outlives_the_name() -> object:
    write_file("file", bytes(PAGE))
    with opened("file") as fd, mmap.mmap(fd, PAGE) as view:
        os.unlink("file")
        view[:4] = b"gone"
        view.flush()
        return os.pread(fd, 4, 0).decode()


@row
def a_private_mapping_is_nobody_elses() -> object:
    write_file("file", b"original")
    with opened("file", os.O_RDONLY) as fd:
        with mmap.mmap(fd, 8, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
            view[:4] = b"mine"
            return [view[:].decode(), text("file")]


@row
def mappings_and_permissions() -> object:
    write_file("file", bytes(PAGE))
    outcomes = []
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        for protection in (mmap.PROT_READ, mmap.PROT_WRITE):
            for sharing in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
                with opened("file", flags) as fd:
                    view = attempt(mmap.mmap, fd, PAGE, flags=sharing, prot=protection)
                    outcomes.append(view if isinstance(view, str) else "mapped")
                    if not isinstance(view, str):
                        view.close()
    return outcomes


@row
def beyond_the_end_of_a_mapped_file_is_sigbus() -> object:
    write_file("file", b"x" * 3 * PAGE)
    with opened("file") as fd, mmap.mmap(fd, 3 * PAGE) as view:
        os.ftruncate(fd, 10)
        return [view[5], view[100], in_child(lambda: view[PAGE])]


@row
def a_mapping_sees_the_file_grow() -> object:
    write_file("file", b"x")
    with opened("file") as fd:
        os.ftruncate(fd, 2 * PAGE)
        with mmap.mmap(fd, 2 * PAGE) as view:
            os.pwrite(fd, b"far", PAGE)
            return view[PAGE : PAGE + 3].decode()


@row
def stores_change_mtime() -> object:
    write_file("file", bytes(PAGE))
    os.utime("file", (1, 1))
    with opened("file") as fd, mmap.mmap(fd, PAGE) as view:
        view[0] = 1
        view.flush()
        os.fsync(fd)
    return os.stat("file").st_mtime > 1


# --- space -----------------------------------------------------------------------------------------

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32
FALLOCATE = {
    "allocate": (0, 0, 20_000),
    "allocate beyond": (0, 30_000, 5000),
    "allocate keeping size": (KEEP_SIZE, 0, 50_000),
    "punch": (PUNCH_HOLE | KEEP_SIZE, 4096, 8192),
    "punch uneven": (PUNCH_HOLE | KEEP_SIZE, 100, 9000),
    "punch past the end": (PUNCH_HOLE | KEEP_SIZE, 8192, 1 << 20),
    "punch without keeping size": (PUNCH_HOLE, 0, 4096),
    "zero": (ZERO, 100, 5000),
    "zero beyond": (ZERO, 10_000, 30_000),
    "zero keeping size": (ZERO | KEEP_SIZE, 10_000, 30_000),
    "collapse": (COLLAPSE, 4096, 4096),
    "insert": (INSERT, 4096, 4096),
    "nothing": (0, 0, 0),
    "negative": (0, -1, 10),
    "unknown mode": (0x80, 0, 10),
}


@rows("fallocate", [(name, *arguments) for name, arguments in FALLOCATE.items()])
def _fallocate(mode: int, offset: int, length: int) -> object:
    write_file("file", b"x" * 20_000)
    with opened("file") as fd:
        outcome = attempt(fallocate, fd, mode, offset, length)
    data = read_file("file")
    return [outcome, len(data), data.count(b"x"), data.find(b"\0"), digest(data)]


@row
def fallocate_of_a_directory_and_a_fifo() -> object:
    os.mkfifo("fifo")
    with opened(".", os.O_RDONLY) as directory, opened("fifo", os.O_RDWR) as fifo:
        return [attempt(fallocate, directory, 0, 0, 1), attempt(fallocate, fifo, 0, 0, 1)]


@row
def holes_and_data() -> object:
    with opened("file", CREATE) as fd:
        os.pwrite(fd, b"x" * MIB, 4 * MIB)
        os.ftruncate(fd, 10 * MIB)
        asked = [(0, os.SEEK_DATA), (0, os.SEEK_HOLE), (4 * MIB, os.SEEK_DATA), (4 * MIB, os.SEEK_HOLE),
                 (4 * MIB + 5, os.SEEK_DATA), (5 * MIB, os.SEEK_DATA), (10 * MIB, os.SEEK_HOLE),
                 (10 * MIB, os.SEEK_DATA), (11 * MIB, os.SEEK_HOLE), (-1, os.SEEK_DATA)]  # fmt: skip
        return [attempt(os.lseek, fd, *question) for question in asked]


@row
def a_punched_hole_gives_space_back() -> object:
    write_file("file", b"x" * MIB)
    with opened("file") as fd:
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, MIB // 2)
        os.fsync(fd)
        return [os.fstat(fd).st_blocks < before, os.lseek(fd, 0, os.SEEK_DATA)]


# --- copies and syncs ------------------------------------------------------------------------------


@rows(
    "copy_file_range",
    [
        ("whole", 0, 0, 300_000),
        ("part", 1000, 5, 70_000),
        ("past the end", 299_990, 0, 100),
        ("at the end", 300_000, 0, 9),
    ],
)
def _copy(source: int, target: int, length: int) -> object:
    data = noise(300_000)
    write_file("source", data)
    write_file("target", b"t" * 10)
    with opened("source") as one, opened("target") as other:
        done = 0
        while count := os.copy_file_range(one, other, length - done, source + done, target + done):
            done += count
            if done == length:
                break
    return [done, digest(read_file("target")), os.stat("source").st_size]


@row
def copy_file_range_within_a_file() -> object:
    write_file("file", b"0123456789")
    with opened("file") as fd:
        apart = attempt(os.copy_file_range, fd, fd, 3, 0, 20)
        overlapping = attempt(os.copy_file_range, fd, fd, 5, 0, 2)
    return [apart, overlapping, text("file")]


@row
def copy_file_range_of_the_wrong_descriptors() -> object:
    write_file("file", b"data")
    write_file("other", b"")
    with opened("file", os.O_RDONLY) as reader, opened("other", os.O_WRONLY | os.O_APPEND) as appender:
        with opened("other", os.O_RDONLY) as other, opened(".", os.O_RDONLY) as directory:
            pairs = [
                (reader, appender),
                (reader, other),
                (appender, reader),
                (directory, other),
                (reader, directory),
            ]
            return [attempt(os.copy_file_range, *pair, 4) for pair in pairs]


@row
def sendfile_from_here_to_here() -> object:
    write_file("source", noise(100_000))
    with opened("source", os.O_RDONLY) as one, opened("target", CREATE) as other:
        done = 0
        while count := os.sendfile(other, one, done, 1 << 20):
            done += count
    return [done, digest(read_file("target"))]


@row
def syncing() -> object:
    os.mkfifo("fifo")
    with (
        opened("file", CREATE) as fd,
        opened(".", os.O_RDONLY) as directory,
        opened("fifo", os.O_RDWR) as fifo,
    ):
        os.write(fd, b"x")
        return [
            attempt(call, target) for target in (fd, directory, fifo) for call in (os.fsync, os.fdatasync)
        ]


@row
def advice() -> object:
    write_file("file", bytes(100_000))
    kinds = (os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED, os.POSIX_FADV_SEQUENTIAL, 99)
    with opened("file") as fd:
        return [attempt(os.posix_fadvise, fd, 0, 0, kind) for kind in kinds] + [
            digest(os.pread(fd, 1 << 20, 0))
        ]


@row
def direct_io_reads_what_was_written() -> object:
    write_file("file", noise(2 * PAGE))
    try:
        fd = os.open("file", os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        return error.errno == errno.EINVAL or error.errno  # not every filesystem has it
    try:
        with mmap.mmap(-1, PAGE) as page:
            count = os.readv(fd, [page])
            same = page[:] == noise(2 * PAGE)[:PAGE]
            page[:4] = b"fast"
            os.pwritev(fd, [page], 0)
        return [count, same] == [PAGE, True] and read_file("file")[:4] == b"fast"
    finally:
        os.close(fd)


# --- files whose name is gone or another's ---------------------------------------------------------


@row
def unlinked_and_open() -> object:
    with opened("file", CREATE) as fd:
        os.write(fd, b"before")
        os.unlink("file")
        os.write(fd, b" after")
        os.ftruncate(fd, 10)
        os.fchmod(fd, 0o600)
        os.utime(fd, (5, 6))
        os.fsync(fd)
        status = os.fstat(fd)
        reopened = attempt(read_file, f"/proc/self/fd/{fd}")
        return [
            os.pread(fd, 20, 0).decode(),
            status.st_nlink,
            oct(status.st_mode),
            status.st_mtime,
            repr(reopened),
        ]


@row
def unlinked_and_made_again() -> object:
    write_file("file", b"old")
    with opened("file") as old:
        os.unlink("file")
        write_file("file", b"new")
        os.write(old, b"OLD")
        return [os.pread(old, 9, 0).decode(), text("file"), os.fstat(old).st_ino != os.stat("file").st_ino]


@row
def renamed_over_and_open() -> object:
    write_file("file", b"old")
    write_file("new", b"new")
    with opened("file") as fd:
        os.rename("new", "file")
        os.pwrite(fd, b"still old", 0)
        return [os.pread(fd, 20, 0).decode(), os.fstat(fd).st_nlink, text("file")]


@row
def renamed_and_open() -> object:
    write_file("file", b"content")
    os.mkdir("directory")
    with opened("file") as fd:
        os.rename("file", "directory/moved")
        os.pwrite(fd, b"CON", 0)
        return [text("directory/moved"), os.fstat(fd).st_nlink]


@row
def many_unlinked_files_at_once() -> object:
    descriptors = []
    for index in range(60):
        descriptors.append(os.open("file", CREATE | os.O_EXCL))
        os.write(descriptors[-1], b"%d" % index)
        os.unlink("file")
    contents = [int(os.pread(fd, 9, 0)) for fd in descriptors]
    for fd in descriptors:
        os.close(fd)
    return [contents == list(range(60)), os.listdir()]


@row
def a_write_by_another_user_drops_setuid() -> object:
    outcomes = []
    for change in ("write", "truncate", "fallocate"):
        write_file("file", b"content")
        os.chmod("file", 0o6777)

        def act(change: str = change) -> None:
            with opened("file") as fd:
                if change == "write":
                    os.write(fd, b"x")
                elif change == "truncate":
                    os.ftruncate(fd, 1)
                else:
                    fallocate(fd, 0, 0, 100)

        user = NOBODY if os.geteuid() == 0 else None
        outcomes.append([in_child(act, user=user), oct(os.stat("file").st_mode)])
    return outcomes


@row
def splice_through_a_pipe() -> object:
    data = noise(50_000)
    write_file("source", data)
    reader, writer = os.pipe()
    with opened("source", os.O_RDONLY) as one, opened("target", CREATE) as other:
        done = 0
        while count := os.splice(one, writer, 65536, offset_src=done):
            moved = 0
            while moved < count:
                moved += os.splice(reader, other, count - moved)
            done += count
    os.close(reader)
    os.close(writer)
    return [done, read_file("target") == data]


@row
def preadv2_without_waiting() -> object:
    write_file("file", b"content")
    with opened("file") as fd:
        os.pread(fd, 10, 0)
        buffer = bytearray(10)
        outcome = attempt(os.preadv, fd, [buffer], 0, os.RWF_NOWAIT)
    return outcome in (7, "EAGAIN", "ENOTSUP")


@row
def sync_file_range_is_taken() -> object:
    from .table import LIBC

    with opened("file", CREATE) as fd:
        os.write(fd, b"x" * PAGE)
        return attempt(lambda: checked(LIBC.sync_file_range(fd, 0, 0, 7)))
