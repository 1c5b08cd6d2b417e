"""Programs of other architectures: QEMU's emulators from Debian, as interpreters that the kernel knows (binfmt_misc).

The law: an emulator is fetched once, by apt, which checks who signed it; from then on it is on the data disk, and a
boot takes no network, and a write for each. The kernel opens it when it is told of it (flag F), so containers need no
part of it.

Format: Documentation/admin-guide/binfmt-misc.rst; magic numbers are elf(5)'s, with the masks that QEMU's own
scripts/qemu-binfmt-conf.sh has.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from protocol.api import ArchitecturesUsed, UseArchitectures
from protocol.errors import ErrorCode, RpcError
from protocol.link import Service

log = logging.getLogger(__name__)

KEPT = "var/lib/agentctl/foreign"
"""On the data disk."""

REGISTRY = "proc/sys/fs/binfmt_misc"

PACKAGE = "qemu-user"
"""Debian's, of 71 MB, with all emulators, of which those that are wanted are kept: some 16 MB each. They are static."""

FETCH_TIME = 900.0
"""Seconds for apt's lists and the package."""

STEP_TIME = 60.0

FLAGS = "POCF"
"""argv[0] is kept (P), the kernel opens the program (O), whose set-user-id counts (C); for F see above."""

MAX_PROBLEM = 300
"""Characters of what a program says."""


@dataclass(frozen=True, slots=True)
class Elf:
    """What programs of an architecture begin with, and which of QEMU's emulators runs them."""

    emulator: str
    machine: int
    bits: int = 64
    big_endian: bool = False

    @property
    def rule(self) -> tuple[str, str]:
        """Magic and mask, escaped as binfmt_misc wants them."""
        order = "big" if self.big_endian else "little"
        identity = bytes([0x7F, *b"ELF", self.bits // 32, 2 if self.big_endian else 1, 1, 0]) + bytes(8)
        magic = identity + (2).to_bytes(2, order) + self.machine.to_bytes(2, order)  # type: ignore[arg-type]
        # Any ABI; ET_EXEC (2) or ET_DYN (3).
        mask = b"\xff" * 7 + b"\0" + b"\xff" * 8 + (0xFFFE).to_bytes(2, order) + b"\xff\xff"  # type: ignore[arg-type]
        return _escaped(magic), _escaped(mask)


ARCHITECTURES = {
    "amd64": Elf("x86_64", 0x3E),
    "arm64": Elf("aarch64", 0xB7),
    "armhf": Elf("arm", 0x28, bits=32),
    "i386": Elf("i386", 0x03, bits=32),
    "loong64": Elf("loongarch64", 0x102),
    "ppc64el": Elf("ppc64le", 0x15),
    "riscv64": Elf("riscv64", 0xF3),
    "s390x": Elf("s390x", 0x16, big_endian=True),
}

NATIVE = {"x86_64": ("amd64", "i386"), "aarch64": ("arm64",)}
"""By the machine: what its processor runs by itself."""

Run = Callable[[Sequence[str], float, Path], None]
"""Runs a program in a folder for so many seconds. Raises ``OSError``, ``subprocess.SubprocessError``."""


def run_program(argv: Sequence[str], timeout: float, folder: Path) -> None:
    subprocess.run(
        argv, cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout
    )


class ForeignPrograms:
    """Answers ``UseArchitectures``."""

    def __init__(
        self, root: Path = Path("/"), *, machine: str = platform.machine(), run: Run = run_program
    ) -> None:
        self._kept = root / KEPT
        self._registry = root / REGISTRY
        self._machine = machine
        self._run = run
        self._lock = trio.Lock()

    def register(self, service: Service) -> None:
        service.on_request(UseArchitectures, self.use)

    async def use(self, request: UseArchitectures) -> ArchitecturesUsed:
        """Have these. ``RpcError`` INVALID for one that is not known, with nothing done."""
        if unknown := [name for name in request.names if name not in ARCHITECTURES]:
            raise RpcError(ErrorCode.INVALID, f"there is no architecture {unknown[0][:32]!r}")
        native = NATIVE.get(self._machine, ())
        wanted = {ARCHITECTURES[name].emulator: name for name in request.names if name not in native}
        async with self._lock:
            problems = await trio.to_thread.run_sync(self._use, wanted)
        for problem in problems:
            log.warning("foreign.problem %s", problem)
        return ArchitecturesUsed(problems)

    def _use(self, wanted: dict[str, str]) -> list[str]:
        """``wanted``: architectures by their emulator."""
        try:
            if not wanted and not (self._registry / "register").exists():
                return []
            self._mount()
            self._forget_others(wanted)
            if missing := [emulator for emulator in wanted if not (self._kept / f"qemu-{emulator}").exists()]:
                self._fetch(missing)
        except (OSError, subprocess.SubprocessError) as error:
            return [f"the VM runs no programs of {', '.join(wanted.values())}: {_reason(error)}"]
        return [
            problem for emulator, name in wanted.items() if (problem := self._tell_kernel(emulator, name))
        ]

    def _mount(self) -> None:
        if not (self._registry / "register").exists():
            self._run(
                ["mount", "-t", "binfmt_misc", "binfmt_misc", str(self._registry)], STEP_TIME, Path("/")
            )

    def _forget_others(self, wanted: dict[str, str]) -> None:
        ours = {elf.emulator for elf in ARCHITECTURES.values()}
        for rule in self._registry.glob("qemu-*"):
            emulator = rule.name.removeprefix("qemu-")
            if emulator in ours and emulator not in wanted:
                rule.write_text("-1")

    def _fetch(self, emulators: Sequence[str]) -> None:
        """Keep these emulators of Debian's package."""
        log.info("foreign.fetch emulators=%s", ",".join(emulators))
        scratch = self._kept / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            # As root, since the folder is nobody else's.
            apt = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
            self._run([*apt, "update"], FETCH_TIME, scratch)
            self._run([*apt, "download", PACKAGE], FETCH_TIME, scratch)
            (package,) = scratch.glob("*.deb")
            names = [f"./usr/bin/qemu-{emulator}" for emulator in emulators]
            unpack = 'dpkg-deb --fsys-tarfile "$0" | tar -x "$@"'
            self._run(["bash", "-o", "pipefail", "-c", unpack, package.name, *names], FETCH_TIME, scratch)
            for name in names:
                unpacked = scratch / name
                with unpacked.open("rb") as file:
                    os.fsync(file.fileno())  # a power cut leaves a whole one or none
                unpacked.replace(self._kept / unpacked.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _tell_kernel(self, emulator: str, name: str) -> str:
        """What is wrong, in a sentence, or ""."""
        if (self._registry / f"qemu-{emulator}").exists():
            return ""
        magic, mask = ARCHITECTURES[name].rule
        line = f":qemu-{emulator}:M::{magic}:{mask}:{self._kept}/qemu-{emulator}:{FLAGS}"
        try:
            (self._registry / "register").write_text(line)
        except OSError as error:
            return f"the VM runs no programs of {name}: {_reason(error)}"
        return ""


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def _reason(error: Exception) -> str:
    match error:
        case subprocess.CalledProcessError():
            said = error.stderr.decode(errors="replace").strip() if error.stderr else ""
            return " ".join(said.split())[-MAX_PROBLEM:] or str(error)
        case subprocess.TimeoutExpired():
            return f"{error.cmd[0]} takes more than {error.timeout:.0f} s"
        case OSError():
            return error.strerror or str(error)
    return str(error)[:MAX_PROBLEM]
