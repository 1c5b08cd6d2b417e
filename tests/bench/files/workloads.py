"""What is timed, as a script of its own: it runs in the guest, beside the mounts, and keeps the time there.

    python3 workloads.py SIZES

``SIZES`` is ``trees.Sizes`` as JSON; ``BENCH_SCRATCH`` names a folder for temporary files, best in memory. Requests are lines of JSON on stdin (``Request``), answers on stdout:
``{"seconds": S, "count": N}`` or ``{"error": "..."}``. Nothing but the standard library is needed, Python
3.11 or later, and of programs cat, cp, find, git, grep, ls, rm and tar.

The laws:
- Only ``run`` is timed, with the monotonic clock of the machine that has the mount: neither the way the
  request came nor what prepares a workload or clears up after it counts.
- A workload returns a count of what it saw or did. It is the same for all peers, or one of them is wrong;
  the cheapest filesystem is an empty one.
- Before a cold workload the caches of this machine's kernel are dropped, and then its program is run once
  on nothing, so that what is timed is never how fast /usr/bin/git comes from the disk.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20
CAT_CHUNK = 128 << 10
RECORD = b"x" * 99 + b"\n"

#: What ``grep`` looks for and does not find, so that it reads every file to its end.
ABSENT = "zzzq qzzz"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer's files are. ``common`` is read, ``own`` is written to; ``guest`` is a local filesystem,
    and ``archive`` the tar that is unpacked, in memory."""

    common: Path
    own: Path
    guest: Path
    archive: Path
    sizes: dict[str, int]


Step = Callable[[Place], Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to time. ``cold``: after dropping caches. ``warm``: after a run, timed or not, of one that
    reads the same. ``before`` and ``after`` are not timed. ``program`` is what it runs, if anything."""

    name: str
    run: Callable[[Place], int]
    cold: bool = False
    warm: bool = False
    before: Step | None = None
    after: Step | None = None
    program: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """Time ``workload`` in the directories ``common`` and ``own``, and ``guest`` for what is copied out.

    ``drop``: cold means dropped caches, and not only a fresh mount. ``warm_up``: run it once untimed before.
    """

    workload: str
    common: str
    own: str
    guest: str
    drop: bool
    warm_up: bool


# --- the workloads ---------------------------------------------------------------------------------


def _output(*command: str, cwd: Path | None = None, allowed: tuple[int, ...] = (0,)) -> bytes:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode not in allowed:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {words[-1] if words else 'silently'}")
    return done.stdout


def _grep(place: Place) -> int:
    # Not to /dev/null: GNU grep recognises it and stops at the first match of each file.
    return len(_output("grep", "-r", ABSENT, str(place.common / "source"), allowed=(1,)))


def _import(place: Place) -> int:
    modules = place.common / "modules"
    code = "import sys; before = len(sys.modules); import everything; print(len(sys.modules) - before)"
    return int(_output(sys.executable, "-c", code, cwd=modules))


def _cat(place: Place) -> int:
    return _read(place.common / "big")


def _cat_text(place: Place) -> int:
    return _read(place.common / "text")


def _read(path: Path) -> int:
    """What cat(1) does, 128 KiB at a time, but counted."""
    buffer = bytearray(CAT_CHUNK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        count = 0
        while size := os.readv(descriptor, [buffer]):
            count += size
    finally:
        os.close(descriptor)
    return count


def _write(place: Place) -> int:
    chunk = os.urandom(CHUNK)
    descriptor = os.open(place.own / "written", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        count = 0
        for _ in range(place.sizes["written"] // CHUNK):
            count += os.write(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return count


def _remove_written(place: Place) -> None:
    (place.own / "written").unlink(missing_ok=True)


def _find(place: Place) -> int:
    return _output("find", str(place.common / "many")).count(b"\n")


def _ls(place: Place) -> int:
    return _output("ls", "-lR", str(place.common / "many")).count(b"\n")


def _stat(place: Place) -> int:
    many = place.sizes["many"]
    directory = place.common / "many"
    for index in range(place.sizes["stats"]):
        number = index % many
        os.stat(f"{directory}/folder_{number // 25:03}/file_{number:05}.txt")
    return place.sizes["stats"]


def _git_status(place: Place) -> int:
    lines = _output("git", "status", "--porcelain", cwd=place.own / "repository")
    if lines:
        raise RuntimeError(f"git status sees changes: {lines[:80]!r}")
    return int(place.sizes["repository"])


def _copy(place: Place) -> int:
    target = place.guest / "copied"
    _output("cp", "-r", str(place.common / "copied"), str(target))
    return 0


def _clear_copied(place: Place) -> None:
    shutil.rmtree(place.guest / "copied", ignore_errors=True)


def _count_copied(place: Place) -> None:
    target = place.guest / "copied"
    if sum(len(files) for _, _, files in os.walk(target)) != place.sizes["source"]:
        raise RuntimeError("cp did not copy everything")
    shutil.rmtree(target)


def _make_room(place: Place) -> None:
    shutil.rmtree(place.own / "unpacked", ignore_errors=True)
    (place.own / "unpacked").mkdir()


def _unpack(place: Place) -> int:
    # Not as their owner: the host's user may not give files away.
    _output("tar", "-x", "--no-same-owner", "-f", str(place.archive), "-C", str(place.own / "unpacked"))
    return place.sizes["unpacked"]


def _be_unpacked(place: Place) -> None:
    """For ``rm`` without the ``unpack`` before it."""
    if not (place.own / "unpacked").exists():
        _make_room(place)
        _unpack(place)


def _remove(place: Place) -> int:
    _output("rm", "-r", str(place.own / "unpacked"))
    return int((place.own / "unpacked").exists())


def _clear_log(place: Place) -> None:
    (place.own / "log").unlink(missing_ok=True)


def _append(place: Place) -> int:
    descriptor = os.open(place.own / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        return sum(os.write(descriptor, RECORD) for _ in range(place.sizes["appends"]))
    finally:
        os.close(descriptor)


def _check_log(place: Place) -> None:
    if (place.own / "log").stat().st_size != place.sizes["appends"] * len(RECORD):
        raise RuntimeError("appends were lost")
    (place.own / "log").unlink()


def _open(place: Place) -> int:
    path = str(place.common / "source" / "folder_000" / "file_00000.c")
    for _ in range(place.sizes["opens"]):
        os.close(os.open(path, os.O_RDONLY))
    return place.sizes["opens"]


GROUPS: tuple[tuple[Workload, ...], ...] = (
    (
        Workload("grep cold", _grep, cold=True, program="grep"),
        Workload("grep warm", _grep, warm=True),
        Workload("open+close", _open, warm=True),
    ),
    (Workload("import warm", _import, warm=True),),
    (Workload("cat cold", _cat, cold=True), Workload("cat warm", _cat, warm=True)),
    (Workload("cat text cold", _cat_text, cold=True),),
    (
        Workload("find cold", _find, cold=True, program="find"),
        Workload("find warm", _find, warm=True),
        Workload("ls -lR", _ls, warm=True),
        Workload("stat", _stat, warm=True),
    ),
    (
        Workload("git status cold", _git_status, cold=True, program="git"),
        Workload("git status warm", _git_status, warm=True),
    ),
    (Workload("cp -r cold", _copy, cold=True, before=_clear_copied, after=_count_copied, program="cp"),),
    (Workload("write+fsync", _write, before=_remove_written, after=_remove_written),),
    (Workload("unpack", _unpack, before=_make_room), Workload("rm -r", _remove, before=_be_unpacked)),
    (Workload("append", _append, before=_clear_log, after=_check_log),),
)
"""Those of a group run one after the other on one peer, then on the next: what is cold in the first is warm
in the second, and the caches dropped for a peer are no other's."""

WORKLOADS: dict[str, Workload] = {workload.name: workload for group in GROUPS for workload in group}


# --- serving ---------------------------------------------------------------------------------------


class Server:
    """Times what it is asked to. ``scratch`` is a directory of its own on a local filesystem."""

    def __init__(self, sizes: dict[str, int], scratch: Path) -> None:
        self._sizes = sizes
        self._scratch = scratch
        self._archive = scratch / "small.tar"
        make_archive(self._archive, sizes["unpacked"])
        # The mounts' files belong to whoever runs the host's side; git would not look at them.
        (scratch / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
        os.environ.update(HOME=str(scratch), LC_ALL="C.UTF-8")
        os.environ.pop("GIT_DIR", None)

    def perform(self, request: Request) -> dict[str, Any]:
        """The answer to one request; whatever goes wrong is told, not raised."""
        try:
            return self._perform(request)
        except (OSError, RuntimeError, ValueError, KeyError, subprocess.SubprocessError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _perform(self, request: Request) -> dict[str, Any]:
        workload = WORKLOADS[request.workload]
        place = Place(
            Path(request.common), Path(request.own), Path(request.guest), self._archive, self._sizes
        )
        if workload.before:
            workload.before(place)
        if request.warm_up:
            workload.run(place)
        if workload.cold and request.drop:
            drop_caches()
            if workload.program:
                _output(workload.program, "--version")
        start = time.monotonic()
        count = workload.run(place)
        seconds = time.monotonic() - start
        if workload.after:
            workload.after(place)
        return {"seconds": seconds, "count": count}


def make_archive(path: Path, count: int) -> None:
    """A tar of ``count`` files of 100 to 4,000 bytes, 25 to a folder."""
    with tarfile.open(path, "w") as archive:
        for index in range(count):
            if index % 25 == 0:
                folder = tarfile.TarInfo(f"folder_{index // 25:03}")
                folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(folder)
            info = tarfile.TarInfo(f"folder_{index // 25:03}/file_{index:05}")
            content = f"file {index}\n".encode() * (10 + index % 300)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def drop_caches() -> None:
    """Forget pages, dentries and inodes (Documentation/admin-guide/sysctl/vm.rst); needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def requests(stream: IO[str]) -> Iterator[Request]:
    for line in stream:
        yield Request(**json.loads(line))


def main() -> None:
    sizes = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_SCRATCH")) as scratch:
        server = Server(sizes, Path(scratch))
        print(json.dumps({"ready": True, **environment()}), flush=True)
        for request in requests(sys.stdin):
            print(json.dumps(server.perform(request)), flush=True)


def environment() -> dict[str, Any]:
    """What this machine is."""
    system = os.uname()
    return {
        "kernel": f"{system.sysname} {system.release}",
        "machine": system.machine,
        "cpus": os.cpu_count() or 0,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


if __name__ == "__main__":
    main()
