"""Compares agentctl's mount with sshfs where the machine is far away: through a line that holds each byte, and one sshd.

    python3 -m tests.bench.attached [--round-trips MS,MS...] [--rate BYTES/s] [--rounds N] [--only WORKLOAD]
                                    [--peers NAMES] [--edits N] [--json FILE] [--work DIRECTORY] [--table FILE]

The mount is here as well, in a mount namespace of its own; what is measured is how much of a program's time is spent on
waiting for the other side. Needs root, git, sshfs, openssh-client, openssh-server and openssh-sftp-server.

Exit status: 0 when every sample was taken, 1 when some are missing or failed or a peer cannot be had, 2 for wrong
arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench import instance as instances
from tests.bench import program
from tests.bench.attached import peers
from tests.bench.attached.report import Attached, Line, dump, load, markdown, tables
from tests.bench.files import __main__ as files
from tests.bench.files import local, report, runner, trees
from tests.bench.files.report import Report
from tests.bench.files.runner import PeerFailed, Plan
from tests.bench.instance import InstanceFailed
from tests.bench.program import say

WORKLOADS = (
    "grep cold", "grep warm", "open+close", "cat cold", "find cold", "find warm", "ls -lR", "stat",
    "git status cold", "git status warm", "cp -r cold",
)  # fmt: skip
"""What reads. What writes takes a round trip a call with both, since it is on the host when the call returns."""

PACKING_WORKLOADS = ("grep cold", "cat cold", "cat text cold", "find cold", "cp -r cold")
"""What a line with a rate is slow for."""

SIZES = dataclasses.replace(
    trees.EMULATED, source=120, many=500, repository=200, big=64 * trees.MIB, stats=1000
)
"""A few hundred files: sshfs takes 2 to 4 round trips for each."""

PACKING_SIZES = dataclasses.replace(SIZES, source=200, big=32 * trees.MIB, text=32 * trees.MIB)
"""16 s at 2 MB/s."""

PROCEDURE = (
    "both through one sshd and one line to it, which holds each byte for half of the round trip in either direction; cold: in a "
    "mount made anew in this round, of files not looked at since; the host's own caches are warm"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.attached", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--round-trips", default="0,20,100", metavar="MS", help="what the lines add (default 0,20,100)"
    )
    parser.add_argument("--rate", help="what the lines carry, each way: 2MB/s (default: any number of bytes)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="samples of each workload on each peer and line"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORKLOAD", help="wildcards; repeatable"
    )
    parser.add_argument("--edits", type=int, default=40, help="seen on each peer and line")
    parser.add_argument(
        "--peers", default="", help=f"separated by commas, of {','.join(peers.PACKING_PEERS)}"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="begin nothing on a line after this")
    parser.add_argument(
        "--patience",
        type=float,
        help="seconds for a workload on a peer, in all rounds (100, with a rate 200)",
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="measure nothing: print what --json wrote, for docs/benchmarks.md",
    )
    parser.add_argument("--json", type=Path, help="where to write every sample (default: in --work)")
    parser.add_argument("--work", type=Path, help="directory to work in (default ~/.cache/agentctl-bench)")
    chosen = parser.parse_args(arguments)
    default = peers.PEERS if chosen.rate is None else peers.PACKING_PEERS
    chosen.names = [name for name in chosen.peers.split(",") if name] or list(default)
    if unknown := [name for name in chosen.names if name not in peers.PACKING_PEERS]:
        parser.error(f"unknown peer {unknown[0]}; there are {', '.join(peers.PACKING_PEERS)}")
    chosen.patience = chosen.patience or (100.0 if chosen.rate is None else 200.0)
    chosen.sizes = SIZES if chosen.rate is None else PACKING_SIZES
    try:
        chosen.bytes_a_second = None if chosen.rate is None else parse_rate(chosen.rate)
    except ValueError as error:
        parser.error(f"--rate: {error}")
    try:
        chosen.lines = [float(number) / 1000 for number in chosen.round_trips.split(",")]
    except ValueError:
        parser.error("--round-trips: numbers, separated by commas")
    found = runner.select(chosen.only)
    default = WORKLOADS if chosen.rate is None else PACKING_WORKLOADS
    chosen.workloads = found if chosen.only else default
    if not chosen.workloads and not chosen.edits:
        parser.error("no workload matches --only")
    if chosen.rounds < 1 or min(chosen.lines) < 0:
        parser.error("--rounds must be at least 1, and --round-trips not negative")
    return chosen


def parse_rate(text: str) -> float:
    """Bytes a second of "2MB/s" or "500kB/s". Raises ``ValueError``."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMG]?)B(?:/s)?", text)
    if found is None or not (rate := float(found[1])):
        raise ValueError(f"{text} is no rate as 2MB/s is")
    return rate * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


def measure(chosen: argparse.Namespace, work: Path, round_trip: float) -> Report:
    """Over one line."""
    started = time.time()
    with contextlib.ExitStack() as stack:
        # What one has asked for ahead is not to be in the way of the next: where a line can be full, each has its own.
        alone = [[name] for name in chosen.names] if chosen.bytes_a_second else [chosen.names]
        found = [
            peer
            for names in alone
            for peer in peers.offered(
                stack, peers.Machine(stack, work, round_trip, chosen.bytes_a_second), names
            )
        ]
        driver = stack.enter_context(local.driver(work, chosen.sizes))
        plan = Plan(
            chosen.rounds,
            chosen.workloads,
            str(work / "copies"),
            drop=False,
            limit=chosen.minutes * 60,
            patience=chosen.patience,
        )
        samples, late = files.take(plan, found, driver)
        freshness = files.watch(chosen, found, work / "share", local.watcher(work))
    bad = any(one.error for one in [*samples, *freshness]) or bool(report.disagreements(samples))
    return report.complete(
        Report(
            command=["python", "-m", "tests.bench.attached", *sys.argv[1:]],
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            seconds=round(time.time() - started, 1),
            rounds=chosen.rounds,
            peers=[peer.name for peer in found],
            workloads=list(chosen.workloads),
            environment=program.host(),
            sizes=dataclasses.asdict(chosen.sizes),
            procedure=PROCEDURE
            if chosen.rate is None
            else f"{PROCEDURE}; a line of {chosen.rate} each way for each peer",
            unavailable={},
            complete=not bad and not late,
            samples=samples,
            freshness=freshness,
        )
    )


def measure_all(chosen: argparse.Namespace, work: Path) -> Attached:
    instances.require("git", "setpriv", "unshare")
    if obstacles := [reason for name in chosen.names if (reason := peers.obstacle(name))]:
        raise PeerFailed(obstacles[0])
    trees.make(work / "share", chosen.names, chosen.sizes)
    lines = []
    for round_trip in chosen.lines:
        say(f"a round trip of {round_trip * 1000:g} ms")
        lines.append(Line(round_trip, measure(chosen, work, round_trip)))
    return Attached(lines)


def main() -> int:
    chosen = parse()
    if chosen.table is not None:
        print(markdown(load(chosen.table.read_text())), end="")
        return 0
    local.enter_namespace("tests.bench.attached")
    program.end_on_signals()
    started = time.strftime("%Y%m%d-%H%M%S")
    try:
        with files.directory(chosen) as work:
            found = measure_all(chosen, work)
            path = chosen.json or work / f"attached-{started}.json"
            path.write_text(dump(found))
    except (InstanceFailed, PeerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(tables(found.lines), end="")
    print(f"every sample: {path}")
    return 0 if all(line.report.complete for line in found.lines) else 1


if __name__ == "__main__":
    sys.exit(main())
