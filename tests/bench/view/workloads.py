"""What is timed, on this machine, with each way to the volume's files.

The laws:
- Only ``run`` is timed. It returns a count of what it saw: the same for all peers, or one of them is wrong.
- A cold workload is the first thing that is done in a mount made anew, so nothing here has seen a file before; a warm
  one comes right behind a cold one that has read the same. What the guest's kernel keeps is as warm for all.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.files.report import Sample

NEEDLE = "needle"
"""It is in each small file once, at its end."""

BIG = "big"

MAKE_TREE = f"""
mkdir -p "$1"; cd "$1"
head -c "$3" /dev/urandom >{BIG}
awk -v files="$2" 'BEGIN {{
    srand(1)
    for (number = 0; number < files; number++) {{
        folder = "small/" int(number / 25)
        if (number % 25 == 0) system("mkdir -p " folder)
        name = folder "/" number ".txt"
        lines = int(exp(4.5 + 1.6 * (rand() + rand() + rand() - 1.5)))
        for (line = 0; line < lines; line++) print "line " line " of " number ", as there are many of them" >name
        print "{NEEDLE}" >name
        close(name)
    }}
}}'
sync
"""
"""For sh: ``$1`` the directory, ``$2`` the number of small files (4 kB in the median, 25 in a folder), ``$3`` the bytes of
the big one. The same files in every run, and random bytes."""


class WorkloadFailed(Exception):
    """A program did not do what it must; the message is a clause."""


class Peer(Protocol):
    """``tree`` is where the files are, on this machine, if this peer is a mount."""

    name: str
    tree: Path | None

    def renew(self) -> None:
        """What this machine knows of the files by this way is forgotten. Raises ``PeerFailed``."""

    def copy(self, name: str, to: Path) -> None:
        """Copy the tree (``.``), or ``name`` in it, to ``to``, which is not there yet."""


class PeerFailed(Exception):
    """A peer cannot be had; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``mounted``: only for a peer that is a mount. ``run`` is given the peer and a name for a copy."""

    name: str
    run: Callable[[Peer, Path], int]
    mounted: bool = True
    warm: bool = False


def output(*command: str, timeout: float = 600.0) -> str:
    """Raises ``WorkloadFailed``."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise WorkloadFailed(f"{command[0]} did not end within {timeout:.0f} s") from None
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise WorkloadFailed(
            f"{command[0]} ended with {done.returncode}: {words[-1] if words else 'silently'}"
        )
    return done.stdout


def _tree(peer: Peer) -> str:
    assert peer.tree is not None
    return str(peer.tree)


def _find(peer: Peer, copy: Path) -> int:
    return len(output("find", _tree(peer)).splitlines())


def _list(peer: Peer, copy: Path) -> int:
    return len(output("ls", "-lR", _tree(peer)).splitlines())


def _grep(peer: Peer, copy: Path) -> int:
    return len(output("grep", "-r", NEEDLE, f"{_tree(peer)}/small").splitlines())


def _copy_tree(peer: Peer, copy: Path) -> int:
    peer.copy(".", copy)
    return sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())


def _copy_file(peer: Peer, copy: Path) -> int:
    peer.copy(BIG, copy)
    return copy.stat().st_size


WORKLOADS = (
    Workload("find", _find),
    Workload("ls -lR", _list),
    Workload("grep -r cold", _grep),
    Workload("grep -r warm", _grep, warm=True),
    Workload("copy the tree", _copy_tree, mounted=False),
    Workload("copy one file", _copy_file, mounted=False),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """``limit``: ``clock`` values from which on nothing is begun."""

    rounds: int
    scratch: Path
    limit: float
    clock: Callable[[], float]


class Run:
    """Rounds, in each the workloads, in each the peers, of whom another one begins each time."""

    def __init__(self, plan: Plan, peers: list[Peer]) -> None:
        self._plan = plan
        self._peers = peers
        self.out_of_time = False

    def samples(self) -> Iterator[Sample]:
        for number in range(1, self._plan.rounds + 1):
            by = (number - 1) % max(1, len(self._peers))
            for group in _groups():
                for peer in [*self._peers[by:], *self._peers[:by]]:
                    yield from self._group(number, peer, group)

    def _group(self, number: int, peer: Peer, group: list[Workload]) -> Iterator[Sample]:
        for workload in group:
            if workload.mounted and peer.tree is None:
                continue
            if self._plan.clock() > self._plan.limit:
                self.out_of_time = True
                return
            yield self._sample(number, peer, workload)

    def _sample(self, number: int, peer: Peer, workload: Workload) -> Sample:
        copy = self._plan.scratch / "copy"
        _remove(copy)
        try:
            if not workload.warm:
                peer.renew()
            begun = self._plan.clock()
            count = workload.run(peer, copy)
            # What was copied is counted as well; that takes milliseconds, and as many for all.
            return Sample(number, workload.name, peer.name, self._plan.clock() - begun, count)
        except (WorkloadFailed, PeerFailed, OSError) as error:
            return Sample(number, workload.name, peer.name, error=str(error))
        finally:
            _remove(copy)


def _groups() -> list[list[Workload]]:
    """A warm one is with the cold one before it."""
    groups: list[list[Workload]] = []
    for workload in WORKLOADS:
        if workload.warm:
            groups[-1].append(workload)
        else:
            groups.append([workload])
    return groups


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
