"""Programs and sockets that live on the filesystem, and who watches it with inotify."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys

from .table import LIBC, Helper, attempt, checked, in_child, opened, row, rows, write_file

SCRIPT = b"#!/bin/sh\necho ran $1\n"


def run(*command: str) -> object:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return [done.returncode, done.stdout]


def program() -> str:
    return shutil.which("true") or "/bin/true"


@row
def a_script_runs() -> object:
    write_file("script", SCRIPT, 0o755)
    return run("./script", "well")


@row
def a_binary_runs() -> object:
    shutil.copy(program(), "binary")
    return run("./binary")


@row
def a_program_replaced_while_it_runs() -> object:
    shutil.copy(shutil.which("sleep") or "/bin/sleep", "binary")
    with subprocess.Popen(["./binary", "20"]) as sleeper:
        shutil.copy(program(), "new")
        os.rename("new", "binary")
        outcome = run("./binary")
        alive = sleeper.poll()
        sleeper.kill()
    return [outcome, alive]


@row
def without_permission_nothing_runs() -> object:
    write_file("script", SCRIPT, 0o644)
    os.mkdir("directory")
    return [attempt(run, name) for name in ("./script", "./directory", "./missing")]


@row
def what_is_no_program() -> object:
    write_file("text", b"no program at all \x00\x01", 0o755)
    write_file("script", b"#!/no/such/interpreter\n", 0o755)
    return [attempt(run, "./text"), attempt(run, "./script")]


@row
def a_running_program_is_not_written() -> object:
    shutil.copy(shutil.which("sleep") or "/bin/sleep", "binary")
    with subprocess.Popen(["./binary", "20"]) as sleeper:
        outcomes = [attempt(os.open, "binary", os.O_WRONLY), attempt(os.truncate, "binary", 0)]
        outcomes.append(attempt(os.open, "binary", os.O_RDWR | os.O_TRUNC))
        sleeper.kill()
    return [*outcomes, attempt(lambda: os.close(os.open("binary", os.O_WRONLY)))]


@row
def what_is_being_written_does_not_run() -> object:
    shutil.copy(program(), "binary")
    with opened("binary", os.O_WRONLY):
        during = attempt(run, "./binary")
    return [during, attempt(run, "./binary")]


@row
def a_program_just_written_runs() -> object:
    """What a compiler's test does, over and over."""
    codes = []
    for index in range(20):
        write_file("script", b"#!/bin/sh\nexit %d\n" % index, 0o755)
        codes.append(subprocess.run(["./script"], timeout=20).returncode)
    return codes == list(range(20))


@row
def a_module_is_imported_and_compiled() -> object:
    os.mkdir("package")
    write_file("package/__init__.py", b"VALUE = 42\n")
    outcomes = [run(sys.executable, "-c", "import package; print(package.VALUE)") for _ in range(2)]
    return [outcomes, len(os.listdir("package"))]


@row
def a_library_is_loaded() -> object:
    import _ctypes

    shutil.copy(_ctypes.__file__, "library.so") if hasattr(_ctypes, "__file__") else shutil.copy(
        program(), "library.so"
    )
    return attempt(lambda: os.stat("library.so").st_size > 0)


# --- FIFOs and sockets -----------------------------------------------------------------------------


@row
def a_fifo_between_processes() -> object:
    os.mkfifo("fifo")

    def write(step: object) -> None:
        with opened("fifo", os.O_WRONLY) as fd:
            os.write(fd, b"through the fifo")

    with Helper(write) as writer, opened("fifo", os.O_RDONLY) as fd:
        data = b""
        while part := os.read(fd, 100):
            data += part
        return [data.decode(), writer.end(), os.stat("fifo").st_size]


@row
def a_fifo_without_a_reader() -> object:
    os.mkfifo("fifo")
    return attempt(os.open, "fifo", os.O_WRONLY | os.O_NONBLOCK)


@rows("a unix socket of", [("streams", socket.SOCK_STREAM), ("datagrams", socket.SOCK_DGRAM)])
def _socket(kind: socket.SocketKind) -> object:
    with socket.socket(socket.AF_UNIX, kind) as server, socket.socket(socket.AF_UNIX, kind) as client:
        server.settimeout(10)
        server.bind("socket")
        twice = attempt(socket.socket(socket.AF_UNIX, kind).bind, "socket")
        if kind is socket.SOCK_STREAM:
            server.listen()
        client.connect("socket")
        client.sendall(b"hello")
        if kind is socket.SOCK_STREAM:
            accepted, _ = server.accept()
            with accepted:
                heard = accepted.recv(100).decode()
        else:
            heard = server.recv(100).decode()
    with socket.socket(socket.AF_UNIX, kind) as late:
        refused = attempt(late.connect, "socket")
    os.unlink("socket")
    with socket.socket(socket.AF_UNIX, kind) as late:
        return [heard, twice, refused, attempt(late.connect, "socket")]


@row
def a_renamed_socket_still_answers() -> object:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        os.rename("socket", "moved")
        os.link("moved", "linked")
        return [attempt(client.connect, "linked"), attempt(socket.socket(socket.AF_UNIX).connect, "socket")]


# --- inotify ---------------------------------------------------------------------------------------

MASKS = {
    0x1: "ACCESS", 0x2: "MODIFY", 0x4: "ATTRIB", 0x8: "CLOSE_WRITE", 0x10: "CLOSE_NOWRITE", 0x20: "OPEN",
    0x40: "MOVED_FROM", 0x80: "MOVED_TO", 0x100: "CREATE", 0x200: "DELETE", 0x400: "DELETE_SELF",
    0x800: "MOVE_SELF", 0x8000: "IGNORED", 0x40000000: "ISDIR",
}  # fmt: skip


class Watch:
    def __init__(self, path: str) -> None:
        self._fd = checked(LIBC.inotify_init1(os.O_NONBLOCK))
        checked(LIBC.inotify_add_watch(self._fd, ctypes.c_char_p(path.encode()), 0xFFF & ~0x31))

    def events(self) -> list[str]:
        """Everything but opening, reading and closing unwritten, in order."""
        seen = []
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            name = data[16 : 16 + length].rstrip(b"\0").decode()
            words = [word for bit, word in MASKS.items() if mask & bit]
            seen.append(" ".join([*words, name]))
            data = data[16 + length :]
        return seen

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)


@row
def inotify_of_a_directory() -> object:
    with Watch(".") as watch:
        write_file("file", b"x")
        os.chmod("file", 0o600)
        os.rename("file", "moved")
        os.mkdir("directory")
        os.symlink("x", "link")
        os.unlink("moved")
        os.rmdir("directory")
        return watch.events()


@row
def inotify_of_a_file() -> object:
    write_file("file", b"x")
    with Watch("file") as watch:
        with opened("file") as fd:
            os.write(fd, b"more")
            os.ftruncate(fd, 1)
        os.link("file", "other")
        os.rename("file", "moved")
        os.utime("moved", (1, 1))
        os.unlink("other")
        os.unlink("moved")
        return watch.events()


@row
def inotify_of_what_another_process_does() -> object:
    with Watch(".") as watch:
        in_child(lambda: write_file("file", b"x"))
        return watch.events()
