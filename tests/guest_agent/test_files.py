"""The real files agent and the real kernel, in a mount namespace of their own; the host is played here.

Whoever touches the mount is another process with a time limit, and the namespace's end takes all mounts along.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from guest_agent import fdstore, files
from guest_agent.files import FILES_PORT, main
from protocol import codec
from protocol import files as calls
from protocol.api import Done
from protocol.files import (
    MAX_FILES_PAYLOAD,
    MountReport,
    MountReports,
    MountShares,
    MountStage,
    NamesGone,
    Share,
)
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.messages import Call
from tests.guest_agent.fuse.entries import Name, piece_of, placed

REPOSITORY = Path(__file__).parents[2]

# --- the host ----------------------------------------------------------------------------------------------


class Folder:
    """A folder of the host's, served by path: enough of a file server for files that nobody renames."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._nodes: dict[int, Path] = {1: root}
        self._given: dict[Path, tuple[int, int]] = {}
        self.forgotten: set[str] = set()

    def perform(self, call: Any, payload: bytes) -> tuple[object, bytes]:
        """Raises ``OSError``."""
        return getattr(self, type(call).__name__)(call, payload)  # type: ignore[no-any-return]

    def _path(self, call: Any) -> Path:
        return self._nodes[call.node] / os.fsdecode(getattr(call, "name", b""))

    def _attributes(self, path: Path) -> tuple[bytes, bool]:
        status = path.lstat()
        times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        attr = calls.ATTR.pack(
            status.st_ino, status.st_size, status.st_blocks, *(ns // 10**9 for ns in times),
            *(ns % 10**9 for ns in times), status.st_mode, status.st_nlink, 0, 0, 0, 4096, 0,
        )  # fmt: skip
        signature = status.st_size, status.st_mtime_ns
        stale = self._given.get(path, signature) != signature
        self._given[path] = signature
        return attr, stale

    def _entry(self, path: Path) -> tuple[object, bytes]:
        attr, stale = self._attributes(path)
        numbers = {known: node for node, known in self._nodes.items()}
        node = numbers.get(path, len(self._nodes) + 1)
        self._nodes[node] = path
        return calls.Entry(node, attr, stale), b""

    def Lookup(self, call: calls.Lookup, payload: bytes) -> tuple[object, bytes]:
        return self._entry(self._path(call))

    def Create(self, call: calls.Create, payload: bytes) -> tuple[object, bytes]:
        os.close(os.open(self._path(call), os.O_CREAT | os.O_EXCL, call.mode & 0o777))
        return self._entry(self._path(call))

    def MakeDirectory(self, call: calls.MakeDirectory, payload: bytes) -> tuple[object, bytes]:
        self._path(call).mkdir()
        return self._entry(self._path(call))

    def GetAttributes(self, call: calls.GetAttributes, payload: bytes) -> tuple[object, bytes]:
        return calls.Attributes(*self._attributes(self._path(call))), b""

    def SetAttributes(self, call: calls.SetAttributes, payload: bytes) -> tuple[object, bytes]:
        if call.valid & calls.SET_SIZE:
            os.truncate(self._path(call), call.size)
        return calls.Attributes(self._attributes(self._path(call))[0]), b""

    def Read(self, call: calls.Read, payload: bytes) -> tuple[object, bytes]:
        with self._path(call).open("rb") as file:
            return Done(), os.pread(file.fileno(), call.size, call.offset)

    def Write(self, call: calls.Write, payload: bytes) -> tuple[object, bytes]:
        path = self._path(call)
        with path.open("r+b") as file:
            offset = path.stat().st_size if call.append else call.offset
            os.pwrite(file.fileno(), payload, offset)
        return calls.Written(len(payload), offset, self._attributes(path)[0]), b""

    def Unlink(self, call: calls.Unlink, payload: bytes) -> tuple[object, bytes]:
        self._path(call).unlink()
        return Done(), b""

    def ListEntries(self, call: calls.ListEntries, payload: bytes) -> tuple[object, bytes]:
        names = [Name(name, kind=0) for name in os.listdir(os.fsencode(self._path(call)))]
        return piece_of(placed(names), call.after, promise=0)

    def Forget(self, call: calls.Forget, payload: bytes) -> tuple[object, bytes]:
        self.forgotten.update(self._nodes[node].name for node in call.nodes)
        return Done(), b""


class Host:
    """What the agent connects to. ``held`` keeps back the answers of operations of these kinds."""

    def __init__(self, folders: dict[int, Folder], listener: trio.SocketListener) -> None:
        self.folders = folders
        self.held: set[str] = set()
        self.kept: list[Call] = []
        self._listener = listener
        self._news = trio.Event()
        self._done: dict[tuple[int, int], tuple[int, object, bytes]] = {}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Link]:
        with trio.fail_after(30):
            channel = SerialChannel(await self._listener.accept())
            stream = await channel.establish()
        service = Service()
        link = Link(stream, Role.HOST, service, Hello(), max_payload=MAX_FILES_PAYLOAD, max_backlog=1 << 28)
        service.on_call(lambda call: self._on_call(link, call))
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                yield link
                nursery.cancel_scope.cancel()
        finally:
            await channel.aclose()

    async def holds(self, count: int) -> None:
        with trio.fail_after(20):
            while len(self.kept) < count:
                await self._news.wait()

    def _on_call(self, link: Link, call: Call) -> None:
        if calls.CALLS[call.op].__name__ in self.held:
            self.kept.append(call)
            self._news.set()
            self._news = trio.Event()
        else:
            link.answer(call.id, *self.perform(call))

    def perform(self, call: Call) -> tuple[int, object, bytes]:
        """Once for each unique, as a host must."""
        message: Any = codec.decode(calls.CALLS[call.op], call.args)
        key = message.share, message.unique
        if not message.CHANGES or key not in self._done:
            try:
                value, payload = self.folders[message.share].perform(message, call.payload)
                self._done[key] = 0, codec.encode(value), payload
            except OSError as error:
                self._done[key] = error.errno or errno.EIO, None, b""
        return self._done[key]


# --- the guest ---------------------------------------------------------------------------------------------


class Guest:
    """A mount namespace, the agent in it, and a service manager's socket that keeps its descriptors."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "guest"
        self.path.mkdir()
        self.socket = directory / "files.sock"
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(directory / "notify"))
        self._manager.settimeout(20)
        self._environment = {
            **os.environ, "PYTHONPATH": str(REPOSITORY), "NOTIFY_SOCKET": str(directory / "notify"),
        }  # fmt: skip
        self.stored: dict[str, int] = {}
        self.told: list[str] = []
        self._namespace = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 600"],
            stdout=subprocess.PIPE,
        )
        assert self._namespace.stdout is not None
        if not self._namespace.stdout.readline():
            self._namespace.communicate(timeout=20)
            self._manager.close()
            pytest.skip("a mount namespace is not permitted here")  # in a chroot
        self.agents: list[subprocess.Popen[bytes]] = []

    def _enter(self, *command: str) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self._namespace.pid}/ns/mnt", *command]

    def start(self) -> subprocess.Popen[bytes]:
        fds = list(self.stored.values())
        copies = "".join(f"exec {number}<&{fd} {fd}<&-; " for number, fd in enumerate(fds, start=3))
        environment = {
            **self._environment, "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(self.stored),
        }  # fmt: skip
        agent = f"{sys.executable} -W error -m guest_agent.files --connect-unix {self.socket}"
        process = subprocess.Popen(
            self._enter("bash", "-c", f"{copies}export LISTEN_PID=$$; exec {agent}"),
            env=environment,
            cwd="/",
            pass_fds=fds,
        )
        self.agents.append(process)
        return process

    def hear(self, wanted: str) -> None:
        """Take what the agent tells the manager until it says ``wanted``."""
        while not any(wanted in told for told in self.told):
            message, fds, _, _ = socket.recv_fds(self._manager, 4096, 4)
            lines = message.decode().splitlines()
            self.told += lines
            name = lines[-1].removeprefix("FDNAME=")
            if lines[0] == "FDSTORE=1":
                self.stored[name] = fds[0]
            elif lines[0] == "FDSTOREREMOVE=1":
                os.close(self.stored.pop(name))

    async def run(self, script: str, *, check: bool = True) -> str:
        """A shell script in the guest's namespace; its output."""
        command = self._enter("timeout", "--signal=KILL", "30", "bash", "-c", script)
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False, cwd="/", env=self._environment
        )
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.stdout.decode() + ("" if check else done.stderr.decode())

    def close(self) -> None:
        for process in [*self.agents, self._namespace]:
            process.kill()
        for fd in self.stored.values():
            os.close(fd)
        for process in [*self.agents, self._namespace]:
            process.wait(timeout=20)
        assert self._namespace.stdout is not None
        self._namespace.stdout.close()
        self._manager.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("mounts need root and /dev/fuse")
    guest = Guest(tmp_path)
    try:
        yield guest
    finally:
        guest.close()


@pytest.fixture
async def host(tmp_path: Path, guest: Guest) -> AsyncIterator[Host]:
    folders = {}
    for number in (1, 2):
        root = tmp_path / f"host{number}"
        root.mkdir()
        folders[number] = Folder(root)
    server = trio.socket.socket(socket.AF_UNIX)
    await server.bind(str(guest.socket))
    server.listen(1)
    listener = trio.SocketListener(server)
    yield Host(folders, listener)
    await listener.aclose()


async def mount(link: Link, *shares: Share) -> list[MountReport]:
    reports: MountReports = await link.request(MountShares(list(shares)))
    return reports.reports


def mounted(*numbers: int) -> list[MountReport]:
    return [MountReport(number, MountStage.MOUNTED) for number in numbers]


async def mounts_of(guest: Guest) -> list[str]:
    """Ours; the namespace began as a copy of this machine's."""
    found = (await guest.run("findmnt -rno TARGET -t fuse.agentctl || true")).split()
    return [path for path in found if path.startswith(str(guest.path))]


# --- mounting ----------------------------------------------------------------------------------------------


async def test_a_share_is_mounted_served_and_taken_off(guest: Guest, host: Host) -> None:
    root, place = host.folders[1].root, guest.path / "a"
    (root / "from-host").write_text("hello\n")
    agent = guest.start()
    async with host.session() as link:
        assert await mount(link, Share(1, str(place))) == mounted(1)
        guest.hear("READY=1")
        assert len(guest.stored) == 1
        assert await guest.run(f"ls -a {place}; cat {place}/from-host") == ".\n..\nfrom-host\nhello\n"
        await guest.run(f"cd {place} && mkdir d && printf one > d/f && printf two >> d/f && rm from-host")
        assert (root / "d" / "f").read_text() == "onetwo"
        assert not (root / "from-host").exists()
        agent.send_signal(signal.SIGTERM)
        assert await trio.to_thread.run_sync(agent.wait) == 0
    assert await mounts_of(guest) == []
    guest.hear("FDSTOREREMOVE=1")
    assert guest.stored == {}


async def test_a_share_that_cannot_be_mounted_is_no_other_ones_trouble(guest: Guest, host: Host) -> None:
    (guest.path / "file").write_text("in the way")
    guest.start()
    async with host.session() as link:
        refused, *others = await mount(
            link, Share(1, str(guest.path / "file")), Share(2, str(guest.path / "b"))
        )
        assert (refused.share, refused.stage) == (1, MountStage.FAILED)
        assert "not a directory" in refused.reason
        assert others == mounted(2)


async def test_exactly_the_wanted_shares_are_mounted(guest: Guest, host: Host) -> None:
    first, second = Share(1, str(guest.path / "a")), Share(2, str(guest.path / "b"))
    guest.start()
    async with host.session() as link:
        assert await mount(link, first) == mounted(1)
        assert await mount(link, second, first) == mounted(2, 1)
        assert sorted(await mounts_of(guest)) == [first.path, second.path]
        assert await mount(link, second) == mounted(2)
        assert await mounts_of(guest) == [second.path]
        assert await mount(link) == []
        assert await mounts_of(guest) == []


async def test_a_share_inside_of_another_is_seen_whatever_the_order(guest: Guest, host: Host) -> None:
    outer, inner = Share(1, str(guest.path / "a")), Share(2, str(guest.path / "a" / "b"))
    (host.folders[2].root / "inside").touch()
    guest.start()
    async with host.session() as link:
        assert await mount(link, inner) == mounted(2)
        assert await mount(link, inner, outer) == mounted(2, 1)
        assert await guest.run(f"ls {inner.path}") == "inside\n"
        assert (host.folders[1].root / "b").is_dir()  # its mount point, which nobody else made
        assert await mount(link, inner) == mounted(2)
        assert await guest.run(f"ls {inner.path}") == "inside\n"


async def test_who_is_in_a_share_stays_in_it_when_another_is_mounted_around_it(
    guest: Guest, host: Host
) -> None:
    outer, inner = Share(1, str(guest.path / "a")), Share(2, str(guest.path / "a" / "b"))
    (host.folders[2].root / "f").write_text("old")
    volume = guest.path / "volume"
    volume.mkdir()
    agent = guest.start()
    async with host.session() as link:
        await mount(link, inner)
        guest.hear("READY=1")
        await guest.run(f"mount --bind {inner.path} {volume}")  # as a container has it
        async with in_the_middle(
            guest,
            f"cd {inner.path}; exec 5<f; cat f",
            f"cat f; stat -c %d . {inner.path} {volume} | uniq | wc -l; stat -c %d {outer.path} . | uniq | wc -l",
        ) as go_on:
            assert await mount(link, outer, inner) == mounted(1, 2)
            await guest.run(f"printf new > {inner.path}/f")
            assert await go_on() == "oldnew1\n2\n"
        await guest.run(
            f"mkdir {inner.path}/d && mount -t tmpfs other {inner.path}/d && touch {inner.path}/d/t"
        )
        assert await mount(link, inner) == mounted(2)
        assert await guest.run(f"ls {inner.path} {inner.path}/d") == (
            f"{inner.path}:\nd\nf\n\n{inner.path}/d:\nt\n"
        )
        await guest.run(f"umount {inner.path}/d")
        agent.kill()
        agent.wait(timeout=20)
    guest.start()
    async with host.session() as link:
        assert await mount(link, inner) == mounted(2)
        assert sorted(await mounts_of(guest)) == [inner.path, str(volume)]


async def test_a_share_becomes_read_only_and_writable_in_its_place(guest: Guest, host: Host) -> None:
    place = str(guest.path / "a")
    (host.folders[1].root / "f").touch()
    guest.start()
    async with host.session() as link:
        assert await mount(link, Share(1, place, read_only=True)) == mounted(1)
        assert "Read-only file system" in await guest.run(f"touch {place}/f", check=False)
        async with in_the_middle(guest, f"cd {place}; stat -c %d .", "echo >>f; stat -c %d .") as go_on:
            assert await mount(link, Share(1, place)) == mounted(1)
            before, after = (await go_on()).split()
        assert before == after
        async with in_the_middle(
            guest, f"cd {place}; exec 5>>f; stat -c %d .", f"echo >&5; stat -c %d {place}"
        ) as go_on:
            # A file is open for writing: its user goes on, if the host lets it, and nobody else may.
            assert await mount(link, Share(1, place, read_only=True)) == mounted(1)
            assert "Read-only file system" in await guest.run(f"touch {place}/f", check=False)
            before, after = (await go_on()).split()
        assert before == after
        assert await mounts_of(guest) == [place]
    assert (host.folders[1].root / "f").read_text() == "\n\n"


async def test_a_mount_that_was_aborted_is_replaced(guest: Guest, host: Host) -> None:
    place = str(guest.path / "a")
    (host.folders[1].root / "f").touch()
    guest.start()
    async with host.session() as link:
        await mount(link, Share(1, place))
        # Busy, so it stays, but all its requests are ended.
        await guest.run(f"cd {place} && ! umount --force {place} 2>&1")
        with trio.fail_after(20):
            while await guest.run(f"ls {place}", check=False) != "f\n":
                await trio.sleep(0.05)
        assert await mounts_of(guest) == [place]


# --- data --------------------------------------------------------------------------------------------------


async def test_what_the_host_changed_is_seen_by_the_next_open(guest: Guest, host: Host) -> None:
    place, file = guest.path / "a", host.folders[1].root / "f"
    file.write_text("old")
    guest.start()
    async with host.session() as link:
        await mount(link, Share(1, str(place)))
        assert await guest.run(f"cat {place}/f") == "old"
        file.write_text("new")  # of the same length, so that only the time tells
        os.utime(file, ns=(1, 1))
        assert await guest.run(f"cat {place}/f") == "new"


async def test_names_that_are_gone_are_forgotten_but_for_what_is_in_use(guest: Guest, host: Host) -> None:
    place, folder = guest.path / "a", host.folders[1]
    for name in ("unused", "open"):
        (folder.root / name).write_text(name)
    guest.start()
    async with host.session() as link:
        await mount(link, Share(1, str(place)))
        fifo = guest.path / "go"
        os.mkfifo(fifo)
        script = f"cat {place}/unused; exec 5<{place}/open; read; cat <&5"
        output = await in_background(guest, f"{{ {script}; }} <{fifo}")
        async with await trio.open_file(fifo, "w") as go:
            await trio.to_thread.run_sync(lambda: wait_for(lambda: len(folder._nodes) == 3))
            await link.notify(NamesGone(1, [1, 1], [b"unused", b"open"]))
            await trio.to_thread.run_sync(lambda: wait_for(lambda: folder.forgotten == {"unused"}))
            await go.write("\n")
        assert (await output()).endswith("open")
        await trio.to_thread.run_sync(lambda: wait_for(lambda: folder.forgotten == {"unused", "open"}))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_an_append_goes_to_the_end_that_the_host_knows(guest: Guest, host: Host) -> None:
    place, file = guest.path / "a", host.folders[1].root / "log"
    file.write_text("1\n")
    guest.start()
    async with host.session() as link:
        await mount(link, Share(1, str(place)))
        script = f"exec 5>>{place}/log; cat {place}/log; echo; read; echo 3 >&5; cat {place}/log"
        fifo = guest.path / "go"
        os.mkfifo(fifo)

        async def edit() -> None:
            with file.open("a") as appended:
                appended.write("2\n")
            async with await trio.open_file(fifo, "w") as go:
                await go.write("\n")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(edit)
            said = await guest.run(f"{script} < {fifo}")
        assert said.endswith("1\n2\n3\n")


# --- what comes and goes -----------------------------------------------------------------------------------


async def in_background(guest: Guest, script: str) -> Callable[[], Any]:
    """Start a script; the result is to be awaited for its output."""
    done = trio.Event()
    output: list[str] = []

    async def run() -> None:
        output.append(await guest.run(script))
        done.set()

    trio.lowlevel.spawn_system_task(run)

    async def result() -> str:
        with trio.fail_after(30):
            await done.wait()
        return output[0]

    return result


@asynccontextmanager
async def in_the_middle(guest: Guest, first: str, then: str) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """A block in the middle of a script, which waits before ``then``; what it is given has it go on, and is its
    output."""
    fifo, here = guest.path / "go", guest.path / "here"
    os.mkfifo(fifo)
    result = await in_background(guest, f"{{ {first}; touch {here}; read; {then}; }} <{fifo}")
    async with await trio.open_file(fifo, "w") as go:
        await trio.to_thread.run_sync(lambda: wait_for(here.exists))

        async def go_on() -> str:
            await go.write("\n")
            await go.flush()
            return str(await result())

        yield go_on
    fifo.unlink()
    here.unlink()


OPEN_WITH_ALARM = """
import ctypes, os, signal, sys
taken = []
signal.signal(signal.SIGALRM, lambda *_: taken.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
fd = ctypes.CDLL(None, use_errno=True).open(sys.argv[1].encode(), os.O_RDONLY)  # without Python's second attempt
signal.setitimer(signal.ITIMER_REAL, 0)
print(os.read(fd, 100) if fd >= 0 else os.strerror(ctypes.get_errno()), bool(taken))
"""


async def test_a_signal_with_a_handler_fails_nothing_while_the_host_is_away(guest: Guest, host: Host) -> None:
    place, share = guest.path / "a", Share(1, str(guest.path / "a"))
    (host.folders[1].root / "f").write_text("data")
    (guest.path / "open.py").write_text(OPEN_WITH_ALARM)
    guest.start()
    host.held = {"Lookup"}
    async with host.session() as link:
        await mount(link, share)
        result = await in_background(guest, f"{sys.executable} {guest.path}/open.py {place}/f")
        await host.holds(1)
    await trio.sleep(1)  # several looks at the caller
    host.held = set()
    async with host.session() as link:
        await mount(link, share)
        assert await result() == "b'data' True\n"


@pytest.mark.parametrize("away", [False, True])
async def test_who_is_killed_waits_for_no_host(guest: Guest, host: Host, away: bool) -> None:
    """Another signal has come before: the kernel says nothing of the second."""
    place, share, folder = guest.path / "a", Share(1, str(guest.path / "a")), host.folders[1]
    (folder.root / "f").write_text("data")
    guest.start()
    host.held = {"Lookup"}
    pid = guest.path / "pid"
    async with host.session() as link:
        await mount(link, share)
        result = await in_background(guest, f"(echo $BASHPID >{pid}; exec stat {place}/f) & wait $!; echo $?")
        await host.holds(1)
        os.kill(caller := int(pid.read_text()), signal.SIGSTOP)
        await trio.sleep(0.5)
        if not away:
            os.kill(caller, signal.SIGKILL)
            assert await result() == "137\n"
            assert folder.forgotten == set()
            link.answer(host.kept[0].id, *host.perform(host.kept[0]))  # late, and counted for nobody
            await trio.to_thread.run_sync(lambda: wait_for(lambda: folder.forgotten == {"f"}))
    if away:
        os.kill(caller, signal.SIGKILL)
        assert await result() == "137\n"
    host.held = set()
    async with host.session() as link:
        await mount(link, share)
        assert await guest.run(f"cat {place}/f") == "data"


async def test_a_call_in_flight_survives_its_session(guest: Guest, host: Host) -> None:
    place, root = guest.path / "a", host.folders[1].root
    (root / "log").touch()
    share = Share(1, str(place))
    guest.start()
    host.held = {"Write"}
    async with host.session() as link:
        await mount(link, share)
        result = await in_background(guest, f"echo line >> {place}/log && echo written")
        await host.holds(1)
        host.perform(host.kept[0])  # done, and then the host goes without a word
    host.held = set()
    async with host.session() as link:
        await mount(link, share)
        assert await result() == "written\n"
    assert (root / "log").read_text() == "line\n"


async def test_a_killed_agent_is_followed_by_one_that_goes_on(guest: Guest, host: Host) -> None:
    place, root = guest.path / "a", host.folders[1].root
    (root / "log").touch()
    share = Share(1, str(place))
    agent = guest.start()
    host.held = {"Write", "Lookup"}
    async with host.session() as link:
        await mount(link, share)
        guest.hear("READY=1")
        host.held = {"Write"}
        result = await in_background(guest, f"cd {place} && echo line >> log && pwd && ls")
        await host.holds(1)
        host.perform(host.kept[0])
        agent.kill()
        agent.wait(timeout=20)
    host.held = set()
    guest.start()
    async with host.session() as link:
        assert await mount(link, share) == mounted(1)
        assert await result() == f"{place}\nlog\n"
        assert await mounts_of(guest) == [str(place)]
        await guest.run(f"cat {place}/log && touch {place}/more")
    assert (root / "log").read_text() == "line\n"


async def test_a_bind_mount_of_a_whole_share_is_not_taken_for_it(guest: Guest, host: Host) -> None:
    """Docker's local volumes are such mounts, in the guest's own namespace."""
    share, volume = Share(1, str(guest.path / "a")), guest.path / "volume"
    volume.mkdir()
    (host.folders[1].root / "f").touch()
    agent = guest.start()
    async with host.session() as link:
        await mount(link, share)
        guest.hear("READY=1")
        await guest.run(f"mount --bind {share.path} {volume}")
        agent.kill()
        agent.wait(timeout=20)
    guest.start()
    async with host.session() as link:
        assert await mount(link, share) == mounted(1)
        assert await mounts_of(guest) == [share.path, str(volume)]
        assert await guest.run(f"ls {volume}") == "f\n"


# --- by itself -----------------------------------------------------------------------------------------------


async def test_a_boot_goes_on_without_a_host(
    autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(fdstore, "notify", lambda state, fds=(): told.append(state))
    monkeypatch.setattr(files.Notifiers, "run", lambda self: trio.sleep_forever())
    agent = files.FilesAgent(nursery)
    nursery.start_soon(agent.tell_ready)
    await trio.sleep(files.READY_AFTER - 1)
    assert told == []
    await trio.sleep(2)
    assert told == ["READY=1"]
    nursery.cancel_scope.cancel()


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 2
    said = capsys.readouterr().err
    assert "usage: python3 -m guest_agent.files [PORT" in said
    assert f"(default: {FILES_PORT})" in said


def test_the_agent_imports_nothing_slow() -> None:
    script = "import sys, guest_agent.files; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    modules = done.stdout.split()
    assert not {"pyroute2", "asyncio", "argparse", "guest_agent.ports", "guest_agent.agent"} & set(modules)
