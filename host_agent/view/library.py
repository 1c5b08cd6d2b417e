"""Whether this machine can show a view: the FUSE library, the device, and who may mount.

mfusepy takes the first library that it finds as it is imported, libfuse 2 where both are there. Only libfuse 3 is used
here: with it a file that is open is told of by its handle, and one that is removed needs no other name.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from host_agent.errors import ExitCode, UserError

LIBRARY_PATH: Final = "FUSE_LIBRARY_PATH"
"""Where mfusepy looks first."""

INSTALL: Final = "install it: sudo apt-get install fuse3 (the package is called fuse3 nearly everywhere)"

_PLACES: Final = "/usr/bin:/bin:/usr/local/bin:/usr/sbin:/sbin:/run/wrappers/bin"


def find_library(find: Callable[[str], str | None] = ctypes.util.find_library) -> str | None:
    """libfuse 3: what the user says, or what the linker knows."""
    return os.environ.get(LIBRARY_PATH) or find("fuse3")


def unmounter() -> str | None:
    """libfuse's program, with which an ordinary user mounts and unmounts."""
    return shutil.which("fusermount3", path=os.pathsep.join((os.environ.get("PATH", ""), _PLACES)))


def check(
    device: Path = Path("/dev/fuse"), find: Callable[[str], str | None] = ctypes.util.find_library
) -> str:
    """The library to be used. Raises ``UserError``, a sentence and what to install."""
    library = find_library(find)
    if library is None:
        raise UserError("this machine has no FUSE library (libfuse 3)", INSTALL, ExitCode.DEPENDENCY)
    if not device.exists():
        raise UserError(
            f"there is no {device}", "load the kernel's module: sudo modprobe fuse", ExitCode.DEPENDENCY
        )
    if not os.access(device, os.R_OK | os.W_OK):
        raise UserError(
            f"you may not open {device}", f"let everybody: sudo chmod 666 {device}", ExitCode.DEPENDENCY
        )
    if os.geteuid() and unmounter() is None:
        raise UserError(
            "fusermount3, with which ordinary users mount, is missing", INSTALL, ExitCode.DEPENDENCY
        )
    try:
        import importlib.util

        if importlib.util.find_spec("mfusepy") is None:
            raise ImportError
    except ImportError:
        raise UserError(
            "the Python package mfusepy is not installed",
            "install agentctl again, by ./provision/quickstart or pip",
            ExitCode.DEPENDENCY,
        ) from None
    return library
