"""The store of images, seen from outside: what is in it, and how something of it goes.

The law: an image is whole until it is gone; it is renamed before it is taken apart, so that who is interrupted leaves
what the next build sweeps. Nothing is removed while a build is at work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from provision import commands
from provision.errors import ProvisionError

#: What an image is called: the digest of its recipe.
_NAME = re.compile(r"[0-9a-f]{16}")

#: What a build works in (``provision.image``), which its user may not own all of.
_UNFINISHED = ".build-"
_FAILED_LOG = "failed-build.log"


def stored(store: Path) -> list[Path]:
    """The folders of all images in ``store``, whole or damaged, by name."""
    try:
        return sorted(path for path in store.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    except OSError:
        return []


def leftovers(store: Path) -> list[Path]:
    """What builds that were cut off or failed have left, if none is at work."""
    with _locked(store) as ours:
        if not ours:
            return []
        log = store / _FAILED_LOG
        return sorted([*store.glob(f"{_UNFINISHED}*"), *([log] if log.exists() else [])])


def remove(store: Path, path: Path) -> None:
    """Remove one of ``stored`` or ``leftovers``. Raises ``ProvisionError``."""
    with _locked(store) as ours:
        if not ours:
            raise ProvisionError("an image is just being built", "try again when it is done")
        try:
            _remove(store, path)
        except FileNotFoundError:
            pass  # somebody else has removed it
        except OSError as error:
            raise ProvisionError(
                f"{path} cannot be removed: {error.strerror}", "remove it by hand"
            ) from error


def _remove(store: Path, path: Path) -> None:
    if not path.is_dir():
        path.unlink()
        return
    doomed = path
    if _NAME.fullmatch(path.name):
        doomed = store / f"{_UNFINISHED}{path.name}-removed"
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    if doomed.exists():
        # What a build left may belong to users of its namespace.
        command = [*commands.find_privilege().prefix, "rm", "-rf", "--one-file-system", str(doomed)]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[bool]:
    """Whether no build is at work; then none begins meanwhile."""
    try:
        descriptor = os.open(store / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False  # there is no store
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)
