"""Which accelerator works here: found out by booting a kernel, not by looking for a device file.

The law here: an accelerator is trusted when the first line of the guest's kernel has come out of it.
There are machines whose /dev/kvm opens and on which QEMU aborts, stops with an internal error, or spins
in the kernel's decompressor for ever. TCG is a program and needs no proof. A verdict is remembered for
the QEMU, host kernel, CPU and guest kernel it was found with; a bad one for a day only, since a machine
under heavy load may have been too slow to pass.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import trio

from host_agent.errors import ExitCode, UserError, qemu_unusable
from host_agent.files import write_atomically
from host_agent.process import describe_exit
from provision.machine import Accelerator, probe_argv

logger = logging.getLogger(__name__)

KVM_DEVICE = Path("/dev/kvm")

# A working hypervisor needs well under a second, and even TCG 1.4 s; the rest is for a busy machine.
PROBE_TIMEOUT = 5.0
CONSOLE_MARK = b"Linux version"

# QEMU dumps registers for some 3 KiB when a hypervisor fails; what it says first is what matters.
MAX_OUTPUT = 64 << 10

# After this QEMU stays, stopped for ever: no need to wait for the time limit.
HYPERVISOR_FAILED = b"KVM internal error"

FAILURE_AGE_LIMIT = 24 * 3600.0

# QEMU prints its version in 30 ms; a first run from a slow disk takes seconds.
DESCRIBE_TIMEOUT = 30.0

Clock = Callable[[], float]


class Preference(StrEnum):
    """Which accelerator the user asks for; AUTO is the best one that works."""

    AUTO = "auto"
    KVM = "kvm"
    HVF = "hvf"
    TCG = "tcg"


@dataclass(frozen=True, slots=True)
class Qemu:
    """An installed QEMU: its path, its version line, and whether it can confine itself by seccomp."""

    path: Path
    version: str
    sandbox: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The accelerator to use and, in a sentence, why."""

    accelerator: Accelerator
    reason: str


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe boot showed. ``at`` is in seconds since the epoch."""

    works: bool
    reason: str
    at: float


async def describe_qemu(qemu: Path) -> Qemu:
    """Ask a QEMU what it is. Raises UserError (DEPENDENCY) when it is missing or does not run."""
    version = await _output(qemu, "--version")
    usage = await _output(qemu, "-help")
    return Qemu(qemu, version.partition("\n")[0].strip(), sandbox="\n-sandbox " in usage)


async def choose(
    preference: Preference, *, qemu: Path, kernel: Path, cache: Path, clock: Clock = time.time
) -> Verdict:
    """The accelerator for this machine.

    ``cache`` is the JSON file that remembers verdicts, and ``kernel`` the guest kernel to prove them
    with. Raises UserError when the accelerator asked for does not work, or when QEMU does not.
    """
    described = await describe_qemu(qemu)
    if preference is Preference.TCG:
        return Verdict(Accelerator.TCG, "asked for")
    prober = _Prober(described, kernel, VerdictCache(cache, _key(described, kernel), clock))
    if preference is not Preference.AUTO:
        return await _prove_preference(prober, Accelerator(preference.value))
    failures = []
    for accelerator in _candidates():
        result = await prober.prove(accelerator)
        if result.works:
            return Verdict(accelerator, result.reason)
        failures.append(f"{accelerator} does not work here: {result.reason}")
    return Verdict(Accelerator.TCG, "; ".join(failures) or "no hypervisor is supported on this platform")


async def _prove_preference(prober: _Prober, accelerator: Accelerator) -> Verdict:
    result = await prober.prove(accelerator)
    if not result.works:
        hint = "Use auto to take the best that works, or tcg, which is slow and works everywhere."
        message = f"The accelerator {accelerator} does not work here: {result.reason}."
        raise UserError(message, hint, ExitCode.DEPENDENCY)
    return Verdict(accelerator, f"asked for, {result.reason}")


def _candidates() -> tuple[Accelerator, ...]:
    """The hypervisors of this platform, best first; TCG is what remains."""
    if sys.platform == "darwin":
        return (Accelerator.HVF,)
    return (Accelerator.KVM,) if sys.platform == "linux" else ()


def obstacle() -> str:
    """Why there is no point in a boot under this platform's best hypervisor, as a sentence; empty if there is one."""
    for accelerator in _candidates():
        if found := _obstacle(accelerator):
            return f"{accelerator} does not work here: {found}"
    return "" if _candidates() else "no hypervisor is supported on this platform"


class _Prober:
    """Proves accelerators, remembering what a boot has shown."""

    def __init__(self, qemu: Qemu, kernel: Path, cache: VerdictCache) -> None:
        self._qemu = qemu
        self._kernel = kernel
        self._cache = cache

    async def prove(self, accelerator: Accelerator) -> ProbeResult:
        # Permissions change between two calls, and looking costs nothing: never remembered.
        if found := _obstacle(accelerator):
            return ProbeResult(False, found, 0.0)
        if result := self._cache.get(accelerator):
            return result
        works, reason = await probe(probe_argv(self._qemu.path, accelerator, self._kernel))
        logger.info("probed %s: works=%s, %s", accelerator, works, reason)
        return self._cache.put(accelerator, works, reason)


def _obstacle(accelerator: Accelerator) -> str:
    """Why there is no point in a boot, empty if there is one."""
    if accelerator not in _candidates():
        return f"it does not exist on {platform.system()}"
    if accelerator is not Accelerator.KVM:
        return ""
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return f"you may not open {KVM_DEVICE} (is your user in the group kvm?)"
    except OSError as error:
        return f"{KVM_DEVICE} cannot be opened ({error.strerror})"
    return ""


async def probe(argv: list[str], *, timeout: float = PROBE_TIMEOUT) -> tuple[bool, str]:
    """Whether ``argv`` prints the kernel's first line within ``timeout`` seconds, and how it went.

    Whatever happens, nothing of it still runs afterwards. Raises UserError when it cannot be started.
    """
    started = trio.current_time()
    async with _started(argv) as boot:
        with trio.move_on_after(timeout):
            await boot.watch()
    if boot.saw_kernel:
        return True, f"proved by a boot in {trio.current_time() - started:.1f} s"
    return False, boot.failure(timeout)


class _ProbeBoot:
    """A QEMU whose output is watched for the kernel's first line."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._console = bytearray()
        self._complaints = bytearray()
        self._ended = False
        self.saw_kernel = False

    async def watch(self) -> None:
        """Return at the kernel's first line, at the hypervisor's failure, or at the end of QEMU."""
        async with trio.open_nursery() as nursery:
            for stream, seen, mark in (
                (self._process.stdout, self._console, CONSOLE_MARK),
                (self._process.stderr, self._complaints, HYPERVISOR_FAILED),
            ):
                assert stream is not None
                nursery.start_soon(_read_until, stream, seen, mark, nursery.cancel_scope)
        self.saw_kernel = CONSOLE_MARK in self._console
        if not nursery.cancel_scope.cancelled_caught:
            await self._process.wait()
            self._ended = True

    def failure(self, timeout: float) -> str:
        """Why there was no first line, in a clause."""
        said = first_complaint(self._complaints.decode(errors="replace"))
        if self._ended:
            return describe_exit("QEMU", self._process.returncode, said)
        if HYPERVISOR_FAILED in self._complaints:
            return f"QEMU stopped: {said}"
        silence = f"no console line in {timeout:g} s"
        return f"{silence}: {said}" if said else silence


async def _read_until(
    stream: trio.abc.ReceiveStream, seen: bytearray, mark: bytes, watching: trio.CancelScope
) -> None:
    """Keep the beginning of what ``stream`` says in ``seen``; cancel ``watching`` at ``mark``."""
    async for data in stream:
        seen += data[: MAX_OUTPUT - len(seen)]
        if mark in seen:
            watching.cancel()


def first_complaint(text: str) -> str:
    """The first line of QEMU's stderr that is more than a warning, without the program's name."""
    for line in text.splitlines():
        if line.strip() and "warning:" not in line:
            return line.removeprefix(line.split(": ", 1)[0] + ": " if line.startswith("qemu") else "").strip()
    return ""


@asynccontextmanager
async def _started(argv: list[str]) -> AsyncIterator[_ProbeBoot]:
    """A QEMU in a session of its own, so that a wrapper script goes together with what it started."""
    try:
        process = await trio.lowlevel.open_process(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise qemu_unusable(Path(argv[0]), error.strerror or str(error)) from None
    try:
        yield _ProbeBoot(process)
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                await stream.aclose()


async def _output(qemu: Path, option: str) -> str:
    """What QEMU prints for ``option``. Raises UserError when it cannot be run."""
    done = None
    try:
        with trio.move_on_after(DESCRIBE_TIMEOUT):
            done = await trio.run_process(
                [qemu, option],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    except OSError as error:
        raise qemu_unusable(qemu, error.strerror or str(error)) from None
    if done is None:
        raise qemu_unusable(qemu, f"{option} took more than {DESCRIBE_TIMEOUT:g} s")
    if done.returncode:
        said = first_complaint(done.stderr.decode(errors="replace"))
        raise qemu_unusable(qemu, describe_exit(f"{qemu.name} {option}", done.returncode, said))
    return done.stdout.decode(errors="replace")


class VerdictCache:
    """The results of probes, in a JSON file. Whatever is wrong with the file, it is only a cache."""

    def __init__(self, path: Path, key: list[str], clock: Clock) -> None:
        self._path = path
        self._key = key
        self._clock = clock

    def get(self, accelerator: Accelerator) -> ProbeResult | None:
        """What is known of it for this key, None if nothing or a failure that is too old."""
        result = self._results().get(accelerator)
        if result and not result.works and not 0 <= self._clock() - result.at < FAILURE_AGE_LIMIT:
            return None
        return result

    def put(self, accelerator: Accelerator, works: bool, reason: str) -> ProbeResult:
        """Remember a result, and drop those of other keys."""
        result = ProbeResult(works, reason, self._clock())
        results = {**self._results(), accelerator: result}
        content = {"key": self._key, "results": {a: dataclasses.asdict(r) for a, r in results.items()}}
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(content, indent=1).encode())
        except OSError as error:
            logger.warning("cannot remember the accelerator in %s: %s", self._path, error)
        return result

    def _results(self) -> dict[Accelerator, ProbeResult]:
        try:
            content = json.loads(self._path.read_bytes())
            if content["key"] != self._key:
                return {}
            return {Accelerator(name): _result(fields) for name, fields in content["results"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}


def _result(fields: dict[str, object]) -> ProbeResult:
    """Raises ValueError or KeyError when the fields are not those of a result."""
    works, reason, at = fields["works"], fields["reason"], fields["at"]
    if isinstance(works, bool) and isinstance(reason, str) and isinstance(at, int | float):
        return ProbeResult(works, reason, at)
    raise ValueError("not a probe result")


def _key(qemu: Qemu, kernel: Path) -> list[str]:
    """All that a verdict depends on. Raises UserError when there is no kernel."""
    try:
        status = kernel.stat()
    except OSError as error:
        message = f"The guest's kernel {kernel} cannot be read: {error.strerror}."
        raise UserError(message, "Build the image again.") from None
    return [
        f"{qemu.path} {qemu.version}",
        f"{platform.system()} {platform.release()}",
        _cpu_model(),
        f"{kernel} {status.st_size} {status.st_mtime_ns}",
        f"{KVM_DEVICE} {KVM_DEVICE.exists()}",
    ]


def _cpu_model() -> str:
    """The host's CPU by name, as far as the platform tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
