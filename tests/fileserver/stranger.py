"""Another process of the host, which does things to files."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pytest

from fileserver.devices import tells
from fileserver.fanotify import identify

FILESYSTEMS = ["disk", "memory"]


@contextmanager
def watchable(filesystem: str, disk: Path) -> Iterator[Path]:
    """An empty folder on one of ``FILESYSTEMS``, if things that happen there are told of."""
    with tempfile.TemporaryDirectory(dir=disk if filesystem == "disk" else "/dev/shm") as folder:
        descriptor = os.open(folder, os.O_PATH)
        kind = identify(descriptor).filesystem
        os.close(descriptor)
        if not tells(kind):
            pytest.skip(f"a filesystem of type {kind:#x} cannot be watched")
        yield Path(folder)


class Stranger:
    """A shell in ``place``. What it was told to do is done when the call returns."""

    def __init__(self, place: Path) -> None:
        self._shell = subprocess.Popen(["sh"], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, commands: str) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{commands}\necho done\n".encode())
        self._shell.stdin.flush()
        assert self._shell.stdout.readline() == b"done\n"

    @property
    def pid(self) -> int:
        return self._shell.pid

    def __enter__(self) -> Stranger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shell.communicate()
