"""The files plane without a VM: the host's file server and the guest's files agent, both real, on one kernel.

A ``Port`` and the holder of a ``Memory`` stand in for QEMU, ``FilesAgent`` for systemd, and the mount is in a mount
namespace of its own. A test thread sees plain calls; what is asynchronous runs in a trio thread beneath.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import trio

from fileserver.control import (
    GetShares,
    GuestStage,
    ServeShares,
    SharedFolder,
    SharesChanged,
    ShareStage,
    ShareState,
    ShareStates,
)
from host_agent.descriptor_store import DescriptorStore
from protocol.errors import LinkError
from protocol.link import Hello, Link, Role, Service
from tests.files.memory import Memory, Use, at_rest, memory, use_of
from tests.files.namespace import Finished, Namespace, Running
from tests.files.port import Port
from tests.files.service import SOURCES, FilesAgent, eventually
from tests.files.sight import Sight

__all__ = ["Folder", "Plane", "ShareStage", "eventually", "loose_directory"]

T = TypeVar("T")

_marks = itertools.count()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder to share: ``name`` below the plane's host directory, and ``at`` below the guest's."""

    name: str = "."
    at: str = ""
    read_only: bool = False
    host_locks: bool = False


@contextlib.contextmanager
def loose_directory() -> Iterator[Path]:
    """A directory that every user may enter, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="agentctl-files-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class TrioThread:
    """A trio loop with a nursery, for synchronous callers."""

    def __enter__(self) -> TrioThread:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self.nursery.cancel_scope.cancel, trio_token=self._token)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await trio.sleep_forever()

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def start(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        async def start() -> Any:
            return await self.nursery.start(function, *arguments)

        return self.call(start)


def _with_marks(marks: int | None) -> list[str]:
    """Before a command: it is in a user namespace that may have ``marks`` of fanotify (user_namespaces(7), /proc/sys/user)."""
    if marks is None:
        return []
    script = f'echo {marks} >/proc/sys/user/max_fanotify_marks; exec "$@"'
    return ["unshare", "--user", "--map-root-user", "sh", "-ec", script, "sh"]


class FileServer:
    """The process on the host, and the control link to it, as the host agent has them."""

    def __init__(
        self,
        loop: TrioThread,
        directory: Path,
        socket_path: Path,
        hidden: Sequence[Path],
        memory: Memory | None = None,
        marks: int | None = None,
        packed: bool = False,
    ) -> None:
        """``packed``: what travels is, if its agent knows of that."""
        self._marks = marks
        self._packed = packed
        self._loop, self._directory, self._socket_path, self._hidden = loop, directory, socket_path, hidden
        self._memory = memory
        self._says = directory / "server.use"
        self._process: subprocess.Popen[bytes] | None = None
        self.prefix: Sequence[str] = ()
        """Before its command line."""
        self.store = DescriptorStore()
        self.changes: list[ShareStates] = []
        self.log = directory / "server.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, folders: list[SharedFolder]) -> ShareStates:
        ours, theirs = socket.socketpair()
        argv = [*self.prefix, *_with_marks(self._marks), sys.executable, "-m"]
        if self._memory is not None:
            argv += ["tests.files.observed", str(self._says)]
        argv += ["host_agent.fileserver", "--guest-socket", str(self._socket_path)]
        if self._memory is not None:
            argv += ["--instance", str(self._memory.instance)]
        argv += ["--control-fd", str(theirs.fileno()), "--journal", str(self._directory / "journal")]
        if self._packed:
            argv.append("--packed")
        for path in self._hidden:
            argv += ["--hide", str(path)]
        store: socket.socket = self._loop.start(self._keep)
        argv += ["--store-fd", str(store.fileno())]
        with self.log.open("ab") as log, theirs, store:
            self._process = subprocess.Popen(
                argv,
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(SOURCES)},
                pass_fds=[theirs.fileno(), store.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._link: Link = self._loop.start(self._run, ours)
        return self.serve(folders)

    async def _keep(self, task_status: trio.TaskStatus[socket.socket]) -> None:
        """What the process sends before its end is in the store once this is over."""
        self._all_kept = threading.Event()
        try:
            with self.store.opened() as (ours, theirs):
                task_status.started(theirs)
                await self.store.follow(ours)
        finally:
            self._all_kept.set()

    def _wait_ended(self, process: subprocess.Popen[bytes]) -> int:
        status = process.wait(20)
        assert self._all_kept.wait(20)
        return status

    async def _run(self, ours: socket.socket, task_status: trio.TaskStatus[Link]) -> None:
        service = Service()
        service.on_notice(SharesChanged, self._on_change)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with contextlib.suppress(LinkError):
            await Link(stream, Role.CLIENT, service, Hello(name="test")).run(task_status)

    async def _on_change(self, notice: SharesChanged) -> None:
        self.changes.append(notice.states)

    def serve(self, folders: list[SharedFolder]) -> ShareStates:
        return self._loop.call(self._link.request, ServeShares(folders))

    def states(self) -> ShareStates:
        return self._loop.call(self._link.request, GetShares())

    def use(self) -> Use | None:
        """Of its memory."""
        return use_of(self.pid, self._says)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            self._wait_ended(process)

    def end(self) -> int:
        """Hang up, as the host agent does when it ends; returns the exit status."""
        assert self._process is not None

        async def leave() -> None:
            with contextlib.suppress(LinkError):
                await self._link.goodbye("the test is over")

        self._loop.call(leave)
        process, self._process = self._process, None
        return self._wait_ended(process)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None


class Plane:
    """Both sides, connected, with ``folders`` mounted. ``host`` and ``guest`` are the two views of the first.

    ``patience``: seconds that the guest waits for an absent host, other than its own. ``with_memory``: some that both
    have mapped; at the end nobody may have kept any of it. ``losing``: each so-manieth message with which the host takes a
    promise back is lost in the guest, which is a fault. ``marks``: how many files the server may watch; it finds no memory
    then.
    """

    def __init__(
        self,
        *folders: Folder,
        patience: float | None = None,
        hide: Sequence[str] = (),
        host: Path | None = None,
        with_memory: bool = True,
        losing: int | None = None,
        marks: int | None = None,
    ) -> None:
        self.with_memory = with_memory
        self._marks = marks
        self._losing = losing
        self._folders = list(folders or [Folder()])
        self._patience = patience
        self._hide = hide
        self._host = host
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Plane:
        with contextlib.ExitStack() as stack:
            self.directory = stack.enter_context(loose_directory())
            self.memory = stack.enter_context(memory(self.directory)) if self.with_memory else None
            self.host_root = self._host or self.directory / "host"
            self.guest_root = self.directory / "guest"
            for folder in self._folders:
                (self.host_root / folder.name).mkdir(parents=True, exist_ok=True)
            self.guest_root.mkdir()
            self.namespace = stack.enter_context(self._make_namespace())
            loop = stack.enter_context(TrioThread())
            host_socket, guest_socket = self.directory / "host.sock", self.directory / "guest.sock"
            self.port = stack.enter_context(Port(host_socket, guest_socket))
            hidden = [self.host_root / name for name in self._hide]
            self.server = FileServer(loop, self.directory, host_socket, hidden, self.memory, self._marks)
            stack.callback(self.server.store.close)
            stack.callback(self.server.kill)
            self.agent = stack.enter_context(self._make_agent(guest_socket))
            stack.callback(self.namespace.force_unmount)
            stack.push(self._show_logs)
            self.start_server()
            self.agent.start()
            self.wait_mounted()
            stack.push(self._look_at_memory)
            self._stack = stack.pop_all()
        return self

    def _make_namespace(self) -> Namespace:
        return Namespace(self.directory)

    def _make_agent(self, guest_socket: Path) -> FilesAgent:
        return FilesAgent(
            self.namespace, self.directory, guest_socket, self._patience, self.memory, self._losing
        )

    def _look_at_memory(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None and self.with_memory and self.server.alive() and self.agent.alive():
            self.wait_at_rest()

    def wait_at_rest(self) -> None:
        """Until both use the memory, and nobody has any of it."""
        seen: list[Use | None] = []

        def is_at_rest() -> bool:
            seen[:] = [self.server.use(), self.agent.use()]
            return at_rest(*seen)

        try:
            eventually("all slots are free", is_at_rest)
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen}") from None

    def _logs(self) -> dict[str, str]:
        return {
            path.name: path.read_text(errors="replace")
            for path in (self.server.log, self.agent.log)
            if path.exists()
        }

    def _show_logs(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            for name, text in self._logs().items():
                print(f"--- {name}\n{text[-6000:]}")

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        logs = self._logs()
        self._stack.__exit__(kind, *exception)
        if kind is None:
            for name, text in logs.items():
                assert "Traceback" not in text, f"{name}:\n{text[-6000:]}"

    # --- where things are --------------------------------------------------------------------------

    @property
    def host(self) -> Path:
        return self.host_path(self._folders[0])

    @property
    def guest(self) -> Path:
        """Only for processes in the namespace."""
        return self.guest_path(self._folders[0])

    def host_path(self, folder: Folder) -> Path:
        return self.host_root / folder.name

    def guest_path(self, folder: Folder) -> Path:
        return self.guest_root / folder.at

    def shared(self, folder: Folder) -> SharedFolder:
        path = str(self.guest_path(folder))
        return SharedFolder(
            zlib.crc32(path.encode()), str(self.host_path(folder)), path, folder.read_only, folder.host_locks
        )

    # --- the two processes -------------------------------------------------------------------------

    def start_server(self) -> None:
        self.server.start([self.shared(folder) for folder in self._folders])

    def restart_server(self) -> None:
        self.server.kill()
        self.start_server()

    def restart_agent(self) -> None:
        self.agent.kill()
        self.agent.start()

    def serve(self, *folders: Folder) -> None:
        """Another list of shares."""
        self._folders = list(folders)
        self.server.serve([self.shared(folder) for folder in folders])

    def state(self, index: int = 0) -> ShareState:
        return self.server.states().shares[index]

    def wait_mounted(self, timeout: float = 30) -> None:
        def mounted() -> bool:
            states = self.server.states()
            return states.connected and all(share.guest is not GuestStage.WAITING for share in states.shares)

        eventually("the guest has mounted everything", mounted, timeout)

    # --- programs on the mount ---------------------------------------------------------------------

    def run(self, argv: Sequence[str], **options: Any) -> Finished:
        """Run a program in the namespace, in the mounted directory unless ``cwd`` says otherwise."""
        return self.namespace.run(argv, **{"cwd": self.guest, **options})

    def sh(self, script: str, **options: Any) -> str:
        """Run a shell script there; returns what it says."""
        return self.run(["sh", "-ec", script], **options).output

    def python(self, script: str, *arguments: str, **options: Any) -> str:
        return self.run([sys.executable, "-c", script, *arguments], **options).output

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Running:
        return self.namespace.start(argv, cwd=self.guest, env=env)

    def heard(self) -> None:
        """Wait until the guest has heard of what the host has done: some ms, or more on a busy machine."""
        mark = self.host / f".heard{next(_marks)}"
        mark.touch()
        # What the guest asks for may be there before it hears of it; what it was promised goes when it does.
        self.sh(f"until test -e {mark.name}; do sleep 0.01; done")
        mark.unlink()
        self.sh(f"while test -e {mark.name}; do sleep 0.01; done")

    def sight(self, directory: Path | None = None) -> Sight:
        """Eyes in ``directory``, which is the mounted one unless it says otherwise."""
        return Sight(self.namespace, directory or self.guest)

    def calls(self, index: int = 0) -> int:
        """What the guest has asked the host so far."""
        return self.state(index).calls

    def with_folder(self, **changes: Any) -> Folder:
        return replace(self._folders[0], **changes)
