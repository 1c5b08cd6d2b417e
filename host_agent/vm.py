"""The QEMU process of an instance: started, found again, watched through its boot, and ended.

The law here: QEMU outlives the host agent. It runs in a session of its own, its identity is on disk
before anybody waits for it, and a host agent that starts later adopts it. Whoever signals it has first
made sure that it is still the same process. How it ended is told in a clause, as far as anyone knows.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import trio

from host_agent.console import (
    ConsoleEvent,
    ConsoleWatcher,
    Farewell,
    Panicked,
    StageReached,
    find_farewell,
    find_panic,
)
from host_agent.errors import ExitCode, UserError, qemu_unusable
from host_agent.process import ProcessIdentity, describe_exit
from host_agent.qmp import QmpClient, QmpClosed, QmpError, QmpEvent, connect_qmp

logger = logging.getLogger(__name__)

# How often the console log is read during a boot, in seconds: a stage is shown before anyone wonders.
CONSOLE_POLL = 0.1

# At the end of a log this much is searched for last words or a panic, in bytes.
LOG_TAIL = 16 << 10

# A monitor answers in a millisecond, or QEMU's main loop is stuck.
MONITOR_TIMEOUT = 5.0

# QEMU opens its monitor some 50 ms after its start.
MONITOR_RETRY = 0.05

# One that an earlier host agent left gets longer: to kill it is to cut its power, and the host may be swapping.
ADOPT_TIMEOUT = 30.0

# A guest that reboots so soon may have been told to at its boot, and be told so again, in seconds. An emulated one
# needs half of that to shut down.
SHORT_LIFE = 120.0

# QEMU writes its caches back before it quits, which on a slow disk takes seconds.
QUIT_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True)
class VmFiles:
    """Where the host finds a QEMU: who it is, its monitor, its console and what it complains about.

    ``qmp``, ``console`` and ``events``, a second monitor for whoever listens all the time, are those of its command
    line. Previous logs are kept one generation, as NAME.1.
    """

    identity: Path
    qmp: Path
    console: Path
    log: Path
    events: Path | None = None


class VirtualMachine:
    """A QEMU that was started or adopted. All methods may be called at any time, by several tasks."""

    def __init__(
        self, identity: ProcessIdentity, files: VmFiles, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.identity = identity
        self.files = files
        self._child = child
        self._monitor_lock = trio.Lock()

    @classmethod
    async def start(cls, argv: Sequence[str], files: VmFiles) -> VirtualMachine:
        """Start QEMU and write down who it is. If it dislikes its command line, it ends soon (``wait``).

        Raises UserError when it cannot be run, when one of this instance already does, when the folder
        of its sockets is open to others, or when the disk is full.
        """
        _require_private(files.qmp.parent)
        if running := ProcessIdentity.read(files.identity):
            message = f"The VM of this instance is already running (QEMU has pid {running.pid})."
            raise UserError(message, "Stop it first.", ExitCode.BUSY)
        _rotate(files.console)
        _rotate(files.log)
        # No checkpoint from here to the record: a cancellation could lose a running QEMU.
        child = _spawn(argv, files.log)
        identity = ProcessIdentity.of_child(child.pid)
        try:
            identity.write(files.identity)
        except OSError as error:
            child.kill()
            child.wait()
            raise _unwritable(files.identity, error) from None
        await trio.lowlevel.cancel_shielded_checkpoint()
        return cls(identity, files, child)

    @classmethod
    async def adopt(cls, files: VmFiles) -> VirtualMachine | None:
        """The QEMU that an earlier host agent left running; None when there is none.

        It has the recorded pid and birth, and its monitor answers. One that is ours and does not answer
        is stuck; it is killed, so that the next start finds the sockets and disks free.
        """
        identity = ProcessIdentity.read(files.identity)
        if identity is None:
            return None
        vm = cls(identity, files)
        if await vm._answers():
            return vm
        logger.warning("killing QEMU with pid %d, whose monitor does not answer", identity.pid)
        await vm.kill()
        return None

    async def _answers(self) -> bool:
        """Whether the monitor does within its time, which includes opening it: QEMU may just be starting."""
        with trio.move_on_after(ADOPT_TIMEOUT):
            while self.alive():
                try:
                    async with self.monitor() as monitor:
                        await monitor.execute("query-status")
                        return True
                except QmpClosed:
                    await trio.sleep(MONITOR_RETRY)
        return False

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[QmpClient]:
        """QEMU's monitor, for one task at a time. Raises QmpClosed, also while QEMU is still starting."""
        async with self._monitor_lock:
            async with connect_qmp(self.files.qmp, timeout=MONITOR_TIMEOUT) as client:
                yield client

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[QmpEvent]]:
        """What QEMU tells from now on, until it ends; ``monitor`` is free for others meanwhile. Raises QmpClosed."""
        if self.files.events is None:
            raise QmpClosed("there is no monitor for events")
        async with connect_qmp(self.files.events, timeout=MONITOR_TIMEOUT) as client:
            yield client.events

    async def resize(self, node: str, size: int) -> None:
        """Give the disk ``node`` ``size`` bytes; the guest is told. Raises QmpClosed or QmpError."""
        async with self.monitor() as monitor:
            await monitor.execute("block_resize", {"node-name": node, "size": size})

    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self.identity.alive()

    async def wait(self) -> str:
        """Wait for QEMU's end, and tell how it ended, in a clause."""
        await self.identity.wait()
        return self.ending()

    def ending(self) -> str:
        """How QEMU, which has ended, did so. Only its parent can know its exit status."""
        return _ending(self._child.wait() if self._child else None, self.files)

    def farewell(self) -> Farewell | None:
        """What the guest itself ended QEMU for; None if it did not, or if nobody can know.

        Its kernel says so on the console. QEMU tells, too (SHUTDOWN in its monitor), but only who listens in that
        moment, and calls a panic a reboot; its exit status is the same for all of them.
        """
        status = self._child.wait() if self._child else None
        console = _tail(self.files.console)
        if status not in (None, 0) or find_panic(console):
            return None
        # A kernel that says nothing, and a QEMU that was told to quit.
        return find_farewell(console) or (Farewell.POWER_OFF if status == 0 else None)

    async def run_state(self) -> str:
        """QEMU's run state (``running``, ``io-error``, ...; RunState of QMP). Raises QmpClosed or QmpError."""
        async with self.monitor() as monitor:
            answer = await monitor.execute("query-status")
        return str(answer.get("status", "")) if isinstance(answer, dict) else ""

    async def resume(self) -> None:
        """Let a guest go on that QEMU stopped. Raises QmpClosed or QmpError."""
        async with self.monitor() as monitor:
            await monitor.execute("cont")

    async def powerdown(self) -> None:
        """Press the guest's power button. Raises QmpClosed; the guest may take its time, or ignore it."""
        async with self.monitor() as monitor:
            await monitor.execute("system_powerdown")

    async def quit(self, timeout: float = QUIT_TIMEOUT) -> str:
        """End QEMU without asking the guest, its disks written back; kill it after ``timeout`` seconds."""
        with trio.move_on_after(timeout):
            if await self._ask_to_quit():
                return await self.wait()
        return await self.kill()

    async def _ask_to_quit(self) -> bool:
        try:
            async with self.monitor() as monitor:
                with suppress(QmpClosed):  # it may end before it answers
                    await monitor.execute("quit")
                return True
        except (QmpClosed, QmpError):
            return False

    async def kill(self) -> str:
        """End QEMU at once, as a power cut would. Returns how it ended, when it has."""
        self.identity.send_signal(signal.SIGKILL)
        return await self.wait()


# --- boot ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BootFailure:
    """Why a boot came to nothing, in a clause, and the last lines of its console."""

    reason: str
    console: tuple[str, ...]


@dataclass(slots=True)
class RestartPolicy:
    """One bad boot is bad luck (a host that stalled, an emulator's race) and is retried; two are a fault.

    ``restarts`` counts them over the life of the host agent.
    """

    allowed: int = 1
    restarts: int = 0
    _used: int = field(default=0, repr=False)

    def retry(self, failure: BootFailure) -> str:
        """The sentence that announces another try. Raises UserError (BOOT) when there is none left."""
        if self._used >= self.allowed:
            last = f" Its last words: {failure.console[-1]}" if failure.console else ""
            hint = "Run agentctl logs to see its console."
            raise UserError(f"The VM does not boot: {failure.reason}.{last}", hint, ExitCode.BOOT)
        self._used += 1
        self.restarts += 1
        tries = f"try {self._used + 1} of {self.allowed + 1}"
        return f"The VM did not boot ({failure.reason}); starting it again, {tries}."

    def booted(self) -> None:
        """A boot went well: the next bad one is the first again."""
        self._used = 0


@dataclass(slots=True)
class RebootPolicy:
    """A guest may reboot as often as it likes, but not do nothing else.

    ``short_lives`` counts those in a row that were over ``SHORT_LIFE`` after their boot.
    """

    allowed: int = 4
    short_lives: int = 0

    def rebooted(self, lived: float) -> None:
        """It did, ``lived`` seconds after its boot. Raises UserError (BOOT) if it is not to be started again."""
        self.short_lives = self.short_lives + 1 if lived < SHORT_LIFE else 0
        if self.short_lives > self.allowed:
            message = f"the guest has rebooted {self.short_lives} times in a row within {SHORT_LIFE:.0f} s of its boot"
            raise UserError(message, "see why: agentctl logs --component console", ExitCode.BOOT)


async def watch_boot(
    vm: VirtualMachine,
    watcher: ConsoleWatcher,
    connected: trio.Event,
    report: Callable[[ConsoleEvent], None],
) -> BootFailure | None:
    """Follow the console until the guest is ``connected`` (None), or the boot has failed and QEMU ended.

    ``report`` is told every event as it happens. ``watcher`` counts in trio's clock.
    """
    with _ConsoleLog(vm.files.console) as log:
        while True:
            ended = not vm.alive()  # asked first, so that what it printed last is read below
            events: list[ConsoleEvent] = list(watcher.receive_data(log.read(), trio.current_time()))
            if not events and (stalled := watcher.check(trio.current_time())):
                events.append(stalled)
            for event in events:
                report(event)
            if reasons := [event.reason for event in events if not isinstance(event, StageReached)]:
                await vm.kill()
                return BootFailure(reasons[0], tuple(watcher.tail))
            if connected.is_set():
                watcher.booted()
                return None
            if ended:
                return BootFailure(vm.ending(), tuple(watcher.tail))
            with trio.move_on_after(CONSOLE_POLL):
                await connected.wait()


class _ConsoleLog:
    """Reads a file that grows, and that need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> _ConsoleLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def read(self) -> bytes:
        """What has been written since the last call."""
        if self._file is None:
            try:
                self._file = self._path.open("rb", buffering=0)
            except FileNotFoundError:
                return b""
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0)  # it grew too large and was emptied
        return self._file.read() or b""


# --- the process and its files ---------------------------------------------------------------------


def _spawn(argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """QEMU in a session of its own, so that neither ^C nor the host agent's end reaches it."""
    try:
        # O_APPEND: when the log grew too large and is emptied, QEMU goes on at its start.
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(log, error) from None
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
            umask=0o177,  # sockets and logs are 0600
        )
    except OSError as error:
        raise qemu_unusable(Path(argv[0]), error.strerror or str(error)) from None
    finally:
        os.close(output)


def _unwritable(path: Path, error: OSError) -> UserError:
    hint = f"Look for a full disk or wrong permissions: df -h {path.parent}; ls -ld {path.parent}"
    return UserError(f"{path} cannot be written: {error.strerror}.", hint, ExitCode.RESOURCES)


def _require_private(directory: Path) -> None:
    """QEMU's monitor obeys whoever can open its socket, so nobody else may reach it."""
    status = directory.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        message = f"{directory} is open to other users of this machine."
        raise UserError(message, f"Make it yours alone: chmod 700 {directory}", ExitCode.GENERAL)


def _rotate(log: Path) -> None:
    try:
        log.replace(log.with_name(log.name + ".1"))
    except FileNotFoundError:
        pass  # the first start
    except OSError as error:
        raise _unwritable(log, error) from None


def kill_recorded(identity: Path) -> bool:
    """End the process that the file ``identity`` names, at once; whether there was one."""
    running = ProcessIdentity.read(identity)
    return running is not None and running.send_signal(signal.SIGKILL)


def _ending(status: int | None, files: VmFiles) -> str:
    if panic := find_panic(_tail(files.console)):
        return Panicked(panic).reason
    if status in (None, 0, -signal.SIGKILL):
        return describe_exit("QEMU", status)
    lines = _tail(files.log).decode(errors="replace").split("\n")
    return describe_exit("QEMU", status, next((line.strip() for line in reversed(lines) if line.strip()), ""))


def _tail(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
            return file.read()
    except FileNotFoundError:
        return b""
