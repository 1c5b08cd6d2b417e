"""The process that serves the host's folders: kept running, told which they are, and asked how they do.

The laws: it never outlives the host agent, since the end of its control socket is its own end; and it is
started again whenever it ends, for good or ill. Being killed costs the guest a wait and nothing else: the
journal has what the next one needs to know, and the descriptor store what it could not open again. So none of
its ends is an error here, but one that does not stay up is said in every row of ``agentctl mounts``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import trio

from fileserver.control import (
    GetShares,
    GuestStage,
    ServeShares,
    SharedFolder,
    SharesChanged,
    ShareState,
    ShareStates,
)
from host_agent import agentlog, file_server_process, mounts
from host_agent.client import hello
from host_agent.descriptor_store import DescriptorStore
from host_agent.errors import ExitCode, UserError
from host_agent.groups import collapsed
from host_agent.mount_rows import LOGS_HINT, row
from host_agent.paths import Home, InstancePaths
from host_agent.process import describe_exit
from protocol.api import Mount, Mounts, MountSpec, MountState
from protocol.errors import AgentctlProtocolError, LinkClosed
from protocol.link import Link, Service
from protocol.session import Role

logger = logging.getLogger(__name__)

#: Before it is started again, doubling: 0.05 s, 0.1 s ... 5 s. The guest's calls wait for 30 s.
FIRST_DELAY = 0.05
MOST_DELAY = 5.0

#: One that lived as long as this was sound; what ended it is no sign that the next will end, too. Seconds.
SOUND_LIFE = 10.0

#: Short lives in a row after which it is said that it does not stay up.
MANY_FAILURES = 3

#: How long whoever asks for the mounts waits for what the file server says of them, seconds.
ANSWER_TIME = 2.0

#: How long whoever adds a mount waits for the guest to mount it, seconds.
SETTLE_TIME = 10.0


class Say(Protocol):
    """``EventLog.say``."""

    def __call__(self, kind: str, message: str, **fields: str) -> None: ...


class FileService:
    """Serves ``specs``. ``remember`` is given a list that has grown; ``say`` is told what users may want to know."""

    def __init__(
        self,
        home: Home,
        paths: InstancePaths,
        specs: Sequence[MountSpec],
        say: Say,
        remember: Callable[[tuple[MountSpec, ...]], None],
        program: Sequence[str] = file_server_process.PROGRAM,
        store: Sequence[int] = (),
        packed: bool = False,
    ) -> None:
        """``store`` are the keeper's sockets for the descriptor store; ``packed`` as for ``GuestLink``."""
        self._specs = mounts.resolved(specs)
        self._log = paths.files_log
        self._identity = paths.files_identity
        self._say = say
        self._remember = remember
        self._argv = [
            *program,
            *("--guest-socket", str(paths.files_socket)),
            *("--instance", str(paths.directory)),
            *("--journal", str(paths.files_journal)),
            *(["--packed"] if packed else []),
            *(f"--hide={folder}" for folder in _private_folders(home)),
        ]
        self._store = store
        self._strayed: dict[str, str] = {}
        self._looking = trio.CapacityLimiter(1)
        if [spec.real_path for spec in self._specs] != [spec.real_path for spec in specs]:
            self._keep_where_they_are()
        self._link: Link | None = None
        self._known: dict[int, ShareState] = {}
        self._connected = False
        self._mounted: set[int] = set()
        self._told: dict[str, MountState] = {}
        self._failures = 0
        self._trouble = ""
        self._news = trio.Event()
        self.pid = 0
        self.restarts = 0

    @property
    def specs(self) -> tuple[MountSpec, ...]:
        return self._specs

    def mounted(self) -> list[MountSpec]:
        """What the guest has mounted, whether or not its calls are answered just now.

        Where it never was, the guest has a folder of its own, or none.
        """
        ids = mounts.numbers(self._specs)
        return [spec for spec in self._specs if ids[spec.guest_path] in self._mounted]

    async def report(self) -> Mounts:
        """All mounts, with what the file server and the disk say of them now if they answer soon."""
        await self._look_where_paths_lead()
        if self._link is not None:
            with suppress(AgentctlProtocolError):
                self._learn(await self._link.request(GetShares(), timeout=ANSWER_TIME))
        return self.current()

    def current(self) -> Mounts:
        """All mounts as they are known to be; their counters may be old."""
        ids = mounts.numbers(self._specs)
        return Mounts(
            [
                row(
                    spec,
                    self._known.get(ids[spec.guest_path]),
                    self._trouble,
                    connected=self._connected,
                    strayed=self._strayed.get(spec.guest_path, ""),
                )
                for spec in mounts.parents_first(self._specs)
            ]
        )

    async def add(self, specs: Sequence[MountSpec]) -> Mounts:
        """Mount ``specs`` as well. Returns when they are, or failed, or took too long.

        Raises ``UserError`` if they cannot be beside those that are there, ``OSError`` if the list cannot be
        kept for the next start; then nothing has changed.
        """
        more = tuple(dict.fromkeys((*self._specs, *mounts.resolved(specs))))
        mounts.check(more)
        self._remember(more)
        self._specs = more
        if self._link is not None:
            # If it dies meanwhile, the next one is told the whole list.
            with suppress(AgentctlProtocolError):
                self._learn(await self._link.request(self._request()))
        await self.settle(SETTLE_TIME, specs)
        return self.current()

    async def settle(self, timeout: float, specs: Sequence[MountSpec] | None = None) -> None:
        """Wait until ``specs`` are mounted or it is known why not, or without them until the guest is connected and all
        of them are; ``timeout`` seconds at the most."""
        with trio.move_on_after(timeout):
            while (specs is None and not self._connected) or self._is_any_waiting(
                self._specs if specs is None else specs
            ):
                await self._news.wait()

    async def remove(self, guest_paths: Sequence[str]) -> Mounts:
        """Mount what is at ``guest_paths`` no longer; who still has something of it open there gets errors.

        Raises ``UserError`` for what is no mount, ``OSError`` if the list cannot be kept; then nothing has changed.
        """
        gone = set(guest_paths)
        if unknown := sorted(gone - {spec.guest_path for spec in self._specs}):
            raise UserError(f"{unknown[0]} is not a mount", "see: agentctl mounts", ExitCode.USAGE)
        less = tuple(spec for spec in self._specs if spec.guest_path not in gone)
        self._remember(less)
        self._specs = less
        if self._link is not None:
            with suppress(AgentctlProtocolError):
                self._learn(await self._link.request(self._request()))
        for path in sorted(gone):
            self._told.pop(path, None)
            self._say("mount", f"{path} is not mounted any more", path=path, state="gone", reason="", hint="")
        return self.current()

    def _keep_where_they_are(self) -> None:
        """The list is of an agentctl that did not say so; until it is kept, the next start would look again."""
        try:
            self._remember(self._specs)
        except OSError as error:
            logger.error("where the folders really are could not be saved: %s", error)

    async def _look_where_paths_lead(self) -> None:
        """Learn of paths that mean another folder now. A disk that does not answer is waited for by one only."""
        await trio.lowlevel.checkpoint()
        if not self._looking.available_tokens:
            return
        with trio.move_on_after(ANSWER_TIME):
            self._strayed = await trio.to_thread.run_sync(
                mounts.strayed, self._specs, abandon_on_cancel=True, limiter=self._looking
            )

    def _is_any_waiting(self, specs: Sequence[MountSpec]) -> bool:
        return any(
            mount.state is MountState.WAITING and mount.spec in specs for mount in self.current().mounts
        )

    # --- one process after another ------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled; then the process has ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agentlog.keep_bounded, self._log)
            with closing(DescriptorStore(inherited=self._store)) as store:
                await self._live_again_and_again(store)

    async def _live_again_and_again(self, store: DescriptorStore) -> None:
        while True:
            started = trio.current_time()
            ending = await self._live(store)
            self._lose(ending, trio.current_time() - started)
            await trio.sleep(min(MOST_DELAY, FIRST_DELAY * 2 ** min(self._failures, 16)))

    def _lose(self, ending: str, lived: float) -> None:
        self._failures = 0 if lived >= SOUND_LIFE else self._failures + 1
        self.restarts += 1
        self._learn(ShareStates([]))
        if self._failures < MANY_FAILURES:
            self._say("file-server", f"{ending}; starting it again")
        elif self._failures == MANY_FAILURES:
            self._trouble = f"the file server does not stay up: {ending}"
            self._say("file-server", self._trouble, hint=LOGS_HINT)
            for mount in self.current().mounts:
                self._tell(mount)

    async def _live(self, store: DescriptorStore) -> str:
        """One process, to its end; how it ended, in a clause."""
        process: trio.Process | None = None
        try:
            await file_server_process.end_predecessor(self._identity)
            with collapsed(), store.opened() as (ours, theirs):
                async with file_server_process.started(self._argv, self._log, theirs) as (process, control):
                    file_server_process.record(process.pid, self._identity)
                    self.pid = process.pid
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(store.follow, ours)
                        await self._talk(control)
        except OSError as error:
            return f"the file server could not be started: {error.strerror or error}"
        except AgentctlProtocolError as error:
            logger.info("file server lost: %s", error)
            return describe_exit("the file server", process.returncode if process else None)
        finally:
            self.pid = 0
        raise AssertionError("a file server does not end in good order by itself")

    async def _talk(self, control: trio.abc.Stream) -> None:
        """Tell it what to serve, and hear how that goes. Raises ``AgentctlProtocolError`` when it has gone."""
        service = Service()
        service.on_notice(SharesChanged, self._on_changed)
        link = Link(control, Role.CLIENT, service, hello("agentctl-host"))
        async with trio.open_nursery() as nursery:
            await nursery.start(_until_over, link)
            with self._linked(link):
                self._learn(await link.request(self._request()))
                await trio.sleep_forever()

    @contextmanager
    def _linked(self, link: Link) -> Iterator[None]:
        self._link = link
        try:
            yield
        finally:
            self._link = None

    def _request(self) -> ServeShares:
        ids = mounts.numbers(self._specs)
        return ServeShares(
            [
                SharedFolder(
                    id=ids[spec.guest_path],
                    host_path=spec.real_path,
                    guest_path=spec.guest_path,
                    read_only=spec.read_only,
                    host_locks=spec.host_locks,
                )
                for spec in mounts.parents_first(self._specs)
            ]
        )

    # --- what it says -------------------------------------------------------------------------------

    async def _on_changed(self, notice: SharesChanged) -> None:
        await trio.lowlevel.checkpoint()
        self._learn(notice.states)

    def _learn(self, states: ShareStates) -> None:
        self._known = {state.id: state for state in states.shares}
        self._connected = states.connected
        for state in states.shares:
            if state.guest is GuestStage.MOUNTED:
                self._mounted.add(state.id)
            elif state.guest is GuestStage.FAILED:
                self._mounted.discard(state.id)
        if self._known:
            self._trouble = ""
        for mount in self.current().mounts:
            self._tell(mount)
        self._news.set()
        self._news = trio.Event()

    def _tell(self, mount: Mount) -> None:
        """Say a state that is not the one last said. To wait is not worth a word: it passes, or fails."""
        path, before = mount.spec.guest_path, self._told.get(mount.spec.guest_path)
        if mount.state in (before, MountState.WAITING) or not (self._known or self._trouble):
            return
        self._told[path] = mount.state
        if mount.state is MountState.MOUNTED:
            message = f"mounted {path}" if before is None else f"the mount {path} is there again"
        else:
            message = f"the mount {path}: {mount.reason}"
        state = mount.state.value
        self._say("mount", message, path=path, state=state, reason=mount.reason, hint=mount.hint)


def _private_folders(home: Home) -> list[Path]:
    """This home, and the usual one if there is one: nothing in the VM has business in either."""
    folders = dict.fromkeys((home.root, Home.usual().root))
    return [folder for folder in folders if folder.is_dir()]


async def _until_over(link: Link, task_status: trio.TaskStatus[Link]) -> None:
    await link.run(task_status)
    raise LinkClosed("the file server has ended")
