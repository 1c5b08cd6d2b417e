"""The program that the measured connections lead to, as something that can be started here or in the guest.

Compiled where there is a C compiler with a static libc, since an emulated Python would itself be what is
measured; in Python otherwise. The report says which.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """``file`` takes a port, and is run by ``interpreter`` if there is one. ``kind`` is for the report."""

    file: Path
    interpreter: tuple[str, ...]
    kind: str

    def command(self, port: int, file: str = "") -> list[str]:
        """The command that serves ``port``, its file being at ``file`` (default: where it was made)."""
        return [*self.interpreter, file or str(self.file), str(port)]


def build(directory: Path) -> Server:
    """The server, compiled into ``directory`` if that can be done."""
    target = directory / "server"
    target.unlink(missing_ok=True)
    source = Path(__file__).with_name("server.c")
    for compiler in filter(shutil.which, COMPILERS):
        done = subprocess.run(
            [compiler, "-O2", "-static", "-o", str(target), str(source)],
            capture_output=True,
            timeout=COMPILE_TIMEOUT,
            check=False,
        )
        if done.returncode == 0:
            return Server(target, (), "C, static")
    return Server(Path(__file__).with_name("fallback.py"), ("python3",), "Python")
