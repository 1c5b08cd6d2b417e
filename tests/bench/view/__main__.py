"""Compares ``agentctl view`` with docker cp and sshfs: a named volume's files on this machine, in one VM and one run.

    python -m tests.bench.view [--rounds N] [--files N] [--peers NAMES] [--minutes M] [--json FILE] [--work DIRECTORY]

Run it from the checkout. It needs, beside what ``agentctl up`` needs, fuse3, sshfs and openssh-client, and a /dev/fuse
that this user may open; a peer that this host lacks is left out, and said to be missing. The VM is one of its own,
deleted afterwards; in emulation a run takes some ten minutes.

Exit status: 0 when every sample was taken, 1 when some are missing or failed or a peer that was named cannot
be had, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from host_agent.boot import find_qemu
from host_agent.errors import UserError
from tests.bench import instance as instances
from tests.bench import program, ssh
from tests.bench.files import report
from tests.bench.files.report import OURS, Report
from tests.bench.instance import Instance, InstanceFailed
from tests.bench.machine import Devices
from tests.bench.program import say
from tests.bench.view import peers
from tests.bench.view.workloads import MAKE_TREE, WORKLOADS, Peer, PeerFailed, Plan, Run
from tests.free_ports import free_port

MIB = 1 << 20

PROCEDURE = (
    "a named volume in the VM, its files in the guest's page cache; all but warm ones in a mount made anew; grep reads the "
    "small files, the tree is these and the big one, the one file is the big one; on this machine's disk afterwards"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.view", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="samples of each workload on each peer")
    parser.add_argument("--files", type=int, default=2000, help="small files in the tree (default 2000)")
    parser.add_argument("--big", type=int, default=64, help="MiB of the big one (default 64)")
    parser.add_argument("--peers", default="", help=f"separated by commas, of {','.join(peers.PEERS)}")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin nothing after this (default 30)")
    parser.add_argument("--accel", default="auto", help="as of agentctl up")
    parser.add_argument("--cpus", type=int, default=2, help="of the VM")
    parser.add_argument("--json", type=Path, help="where to write every sample (default: in --work)")
    parser.add_argument("--work", type=Path, help="directory to work in (default ~/.cache/agentctl-bench)")
    chosen = parser.parse_args(arguments)
    chosen.names = [name for name in chosen.peers.split(",") if name] or list(peers.PEERS)
    if unknown := [name for name in chosen.names if name not in peers.PEERS]:
        parser.error(f"unknown peer {unknown[0]}; there are {', '.join(peers.PEERS)}")
    if min(chosen.rounds, chosen.files, chosen.big) < 1:
        parser.error("--rounds, --files and --big must be at least 1")
    return chosen


def offered(names: Sequence[str], offer: Callable[[str], Peer]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be had, and why the others cannot."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            if reason := peers.obstacle(name):
                raise PeerFailed(reason)
            found.append(offer(name))
        except (PeerFailed, InstanceFailed) as error:
            missing[name] = str(error)
    return found, missing


def measure(chosen: argparse.Namespace, work: Path, started: float) -> Report:
    instances.require("setpriv")
    qemu, port = find_qemu(), free_port()
    arguments = ["--cpus", str(chosen.cpus), "--memory", "2GiB", "--disk", "20GiB", "--accel", chosen.accel]
    say("starting the VM")
    with (
        instances.running(work, Devices(str(qemu), ((port, ssh.PORT),)), arguments) as instance,
        contextlib.ExitStack() as stack,
    ):
        accelerator = str(instance.status().get("accelerator", "unknown"))
        say(f"making the tree ({accelerator})")
        volume = peers.Volume(instance)
        _make_tree(instance, volume.path, chosen)

        def offer(name: str) -> Peer:
            if name == OURS:
                return peers.View(instance, stack)
            return (
                peers.DockerCp(volume)
                if name == peers.DOCKER_CP
                else peers.Sshfs(instance, volume, port, stack)
            )

        found, missing = offered(chosen.names, offer)
        plan = Plan(chosen.rounds, work / "copies", time.monotonic() + chosen.minutes * 60, time.monotonic)
        plan.scratch.mkdir(exist_ok=True)
        run, samples = Run(plan, found), []
        for sample in run.samples():
            samples.append(sample)
            say(
                f"  {sample.round} {sample.workload:14} {sample.peer:9} {sample.error or f'{sample.seconds:.2f}'}"
            )
        environment = {
            **program.host(qemu),
            "guest": f"{instance.guest('uname -r').strip()}, {chosen.cpus} cpus, 2 GiB",
            "accelerator": accelerator,
            "fuse": program.first_line("fusermount3", "--version"),
            "docker": program.first_line(*volume.command("--version")),
        }
    bad = any(sample.error for sample in samples) or bool(report.disagreements(samples))
    return report.complete(
        Report(
            command=["python", "-m", "tests.bench.view", *sys.argv[1:]],
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            seconds=round(time.time() - started, 1),
            rounds=chosen.rounds,
            peers=[peer.name for peer in found],
            workloads=[workload.name for workload in WORKLOADS],
            environment=environment,
            sizes={"files": chosen.files, "big": chosen.big * MIB},
            procedure=PROCEDURE,
            unavailable=missing,
            complete=not bad and not run.out_of_time,
            samples=samples,
        )
    )


def _make_tree(instance: Instance, path: str, chosen: argparse.Namespace) -> None:
    words = ["sh", "-euc", MAKE_TREE, "sh", path, str(chosen.files), str(chosen.big * MIB)]
    instance.agentctl("exec", "-u", "root", *words, timeout=600)


def main() -> int:
    chosen = parse()
    program.end_on_signals()
    started = time.time()
    try:
        with program.directory(chosen.work) as work:
            found = measure(chosen, work, started)
            path = (
                chosen.json or work / f"view-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}.json"
            )
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
