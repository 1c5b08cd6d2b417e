"""Compares agentctl's forwarded connections with ssh -L and QEMU's hostfwd, in one VM and one run.

    python -m tests.bench.ports [--rounds N] [--only MEASUREMENT] [--peers NAMES] [--without-vm] [--json FILE]

Run it from the checkout. It needs, beside what ``agentctl up`` needs, openssh-client, and without a VM
openssh-server; a peer that this host lacks is left out, and said to be missing. The VM is one of its own, deleted
afterwards; in emulation a whole run takes some ten minutes, without a VM five.

Exit status: 0 when every sample was taken, 1 when some are missing or failed or a peer that was named cannot
be had, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from host_agent.boot import find_qemu
from host_agent.errors import UserError
from tests.bench import instance as instances
from tests.bench import program
from tests.bench.instance import Instance, InstanceFailed
from tests.bench.machine import Devices
from tests.bench.ports import measurements, peers, report, server
from tests.bench.ports.measurements import Effort, Peer, Run
from tests.bench.ports.peers import PeerFailed
from tests.bench.ports.report import Report, Sample
from tests.bench.program import say

PROCEDURE = (
    "throughput: all streams together, 10^6 bytes that have arrived, by the seconds until the last has; "
    "round trip: one byte there and back on one connection; connect: opened, one byte exchanged, closed, in turn"
)
EFFORTS = {"native": measurements.NATIVE, "emulated": measurements.EMULATED, "tiny": measurements.TINY}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.ports", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples of each measurement on each peer")
    parser.add_argument(
        "--only", action="append", default=[], metavar="MEASUREMENT", help="wildcards; repeatable"
    )
    parser.add_argument("--peers", default="", help=f"separated by commas, of {','.join(peers.VM_PEERS)}")
    parser.add_argument("--without-vm", action="store_true", help="on this host, without a VM")
    parser.add_argument("--effort", choices=EFFORTS, help="of a sample (default: what suits the accelerator)")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin nothing after this (default 30)")
    parser.add_argument("--accel", default="auto", help="as of agentctl up")
    parser.add_argument("--cpus", type=int, default=2, help="of the VM")
    parser.add_argument("--json", type=Path, help="where to write every sample (default: in --work)")
    parser.add_argument("--work", type=Path, help="directory to work in (default ~/.cache/agentctl-bench)")
    chosen = parser.parse_args(arguments)
    known = peers.LOCAL_PEERS if chosen.without_vm else peers.VM_PEERS
    chosen.names = [name for name in chosen.peers.split(",") if name] or list(known)
    if unknown := [name for name in chosen.names if name not in known]:
        parser.error(f"unknown peer {unknown[0]}; there are {', '.join(known)}")
    chosen.measurements = measurements.select(chosen.only)
    if not chosen.measurements:
        parser.error("no measurement matches --only")
    if chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    return chosen


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run on one machine gave."""

    peers: list[Peer]
    unavailable: dict[str, str]
    environment: dict[str, str]
    effort: Effort
    samples: list[Sample]
    out_of_time: bool


def in_vm(chosen: argparse.Namespace, work: Path) -> Outcome:
    instances.require("setpriv")
    built = server.build(work)
    qemu, ports = find_qemu(), peers.Ports.choose()
    arguments = ["--cpus", str(chosen.cpus), "--memory", "2GiB", "--disk", "20GiB", "--accel", chosen.accel]
    say("starting the VM")
    with instances.running(work, Devices(str(qemu), ports.of_qemu), arguments) as instance:
        accelerator = str(instance.status().get("accelerator", "unknown"))
        environment = {
            **program.host(qemu),
            **_guest(instance),
            "accelerator": accelerator,
            "server": built.kind,
        }
        say(f"starting the peers ({accelerator})")
        with contextlib.ExitStack() as stack:
            guest = peers.Guest(stack, instance, built, ports)
            found, missing = peers.offered(guest.offer, chosen.names, vm=True)
            return _measure(
                chosen, found, missing, environment, "emulated" if accelerator == "tcg" else "native"
            )


def on_host(chosen: argparse.Namespace, work: Path) -> Outcome:
    instances.require("setpriv")
    built = server.build(work)
    with contextlib.ExitStack() as stack:
        local = peers.Local(stack, work, built)
        found, missing = peers.offered(local.offer, chosen.names, vm=False)
        environment = {**program.host(), "server": built.kind}
        return _measure(chosen, found, missing, environment, "native")


def _measure(
    chosen: argparse.Namespace,
    found: list[Peer],
    missing: dict[str, str],
    environment: dict[str, str],
    effort: str,
) -> Outcome:
    amount = EFFORTS[chosen.effort or effort]
    run = Run(chosen.measurements, found, amount, rounds=chosen.rounds, limit=chosen.minutes * 60)
    samples = []
    for sample in run.samples():
        samples.append(sample)
        say(f"  {sample.round} {sample.row:15} {sample.peer:9} {sample.error or f'{sample.value:.1f}'}")
    versions = {**environment, "ssh": program.first_line("ssh", "-V")}
    return Outcome(found, missing, versions, amount, samples, run.out_of_time)


def _guest(instance: Instance) -> dict[str, str]:
    kernel, cpus = instance.guest("uname -r; nproc").split()
    return {"guest": f"{kernel}, {cpus} cpus, 2 GiB"}


def _report(chosen: argparse.Namespace, outcome: Outcome, started: float) -> Report:
    return report.complete(
        Report(
            command=["python", "-m", "tests.bench.ports", *sys.argv[1:]],
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            seconds=round(time.time() - started, 1),
            rounds=chosen.rounds,
            peers=[peer.name for peer in outcome.peers],
            rows=[row for measurement in chosen.measurements for row in measurement.rows],
            environment=outcome.environment,
            effort={name: float(value) for name, value in dataclasses.asdict(outcome.effort).items()},
            procedure=PROCEDURE,
            unavailable=outcome.unavailable,
            complete=not outcome.out_of_time and not any(sample.error for sample in outcome.samples),
            samples=outcome.samples,
        )
    )


def main() -> int:
    chosen = parse()
    program.end_on_signals()
    started = time.time()
    try:
        with program.directory(chosen.work) as work:
            found = _report(
                chosen, on_host(chosen, work) if chosen.without_vm else in_vm(chosen, work), started
            )
            name = f"ports-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}.json"
            path = chosen.json or work / name
            path.write_text(report.dump(found))
    except (InstanceFailed, PeerFailed, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(report.table(found), end="")
    print(f"every sample: {path}")
    asked_for = set(chosen.names) if chosen.peers else set()
    return 0 if found.complete and not asked_for & found.unavailable.keys() else 1


if __name__ == "__main__":
    sys.exit(main())
