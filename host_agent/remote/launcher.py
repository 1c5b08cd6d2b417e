"""What ``python3 agent.pyz`` runs on the machine: unpacks the archive once, and goes on from there.

The law: it compiles under any Python 3.6, so that one that is too old says so in a sentence. Python keeps
bytecode only of files, and trio alone takes a second to compile on a slow machine: so the modules are
unpacked beside each other into ``~/.cache/agentctl``, in a folder named by their content, which appears
whole or not at all. ``check`` compares every file with the archive first.
"""

import contextlib
import os
import sys
from typing import NoReturn

#: Filled in by ``payload.build``: names the folder.
CONTENT = ""

OLDEST = (3, 11)


def fail(problem: str, errno: "int | None" = None, path: str = "") -> NoReturn:
    """Say it so that a person and ``install`` understand, and end."""
    import json

    words = sys.argv[1:]
    if words[:1] == ["check"] and "--nonce" in words[:-1]:
        report = json.dumps({"problem": problem, "errno": errno, "path": path})
        print(f"\nagentctl-failed {words[words.index('--nonce') + 1]} {report}")
    sys.stderr.write(f"agentctl: {problem}{path and f' ({path})'}\n")
    sys.exit(4)


def main() -> None:
    if sys.version_info < OLDEST:
        fail(f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old: it takes 3.11 or newer")
    here = os.path.dirname(os.path.abspath(__file__))
    folder = here if os.path.isdir(here) else _unpacked(here)
    for path in {here, folder}:
        _hold(path)
    sys.path = [folder, *(path for path in sys.path if os.path.abspath(path) != here)]
    from importlib import import_module

    sys.exit(import_module("guest_agent.remote.__main__").main(sys.argv[1:]))


def _unpacked(archive: str) -> str:
    """The folder with the modules of ``archive``, made if need be. Ends the process if it cannot be made."""
    folder = os.path.join(os.path.expanduser("~"), ".cache", "agentctl", "agent-" + CONTENT)
    try:
        if not os.path.isdir(folder) or (sys.argv[1:2] == ["check"] and not _is_whole(archive, folder)):
            _unpack(archive, folder)
    except OSError as error:
        fail(error.strerror or str(error), error.errno, folder)
    return folder


def _is_whole(archive: str, folder: str) -> bool:
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                with open(os.path.join(folder, entry.filename), "rb") as file:
                    if zlib.crc32(file.read()) != entry.CRC:
                        return False
    except OSError:
        return False
    return True


def _unpack(archive: str, folder: str) -> None:
    import shutil
    import tempfile
    import zipfile

    parent = os.path.dirname(folder)
    os.makedirs(parent, 0o700, exist_ok=True)
    new = tempfile.mkdtemp(prefix=".new-", dir=parent)
    try:
        whole = os.path.join(new, "in")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(whole)
        try:
            os.rename(whole, folder)
        except OSError:
            # Another process was faster, and may run from it already; only what is damaged is taken from it.
            if not os.path.isdir(folder):
                raise
            if not _is_whole(archive, folder):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(folder, os.path.join(new, "out"))
                with contextlib.suppress(OSError):  # one more has repaired it
                    os.rename(whole, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _hold(path: str) -> None:
    """It is in use for as long as this process lives, and has been used now: others are cleared away (receiver.py)."""
    import fcntl

    # Not every network filesystem has locks; what is not ours is nobody's to clear away.
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(path)


if __name__ == "__main__":
    main()
