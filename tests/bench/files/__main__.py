"""Compares agentctl's mount with sshfs, virtiofs and the guest's own disk, in one VM and one run.

    python -m tests.bench.files [--rounds N] [--only WORKLOAD] [--peers NAMES] [--edits N] [--without-vm] [--json FILE]

Run it from the checkout. It needs, beside what ``agentctl up`` needs, git, and for the peers openssh-client,
openssh-sftp-server and qemu-system-common; a peer that this host lacks is left out, and said to be missing. The
VM is one of its own, deleted afterwards; in emulation a whole run takes some ten minutes. Without a VM the
same programs are compared in a private mount namespace (``local``).

At the end, EDITS edits are made on the host, and it is measured when each is seen in the guest (``freshness``).

Exit status: 0 when every sample was taken, 1 when some are missing or failed or a peer that was named cannot
be had, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from host_agent.boot import find_qemu
from host_agent.errors import UserError
from tests.bench import instance as instances
from tests.bench import program, ssh
from tests.bench.files import local, peers, report, runner, trees
from tests.bench.files.driver import Driver
from tests.bench.files.freshness import Watcher, measure
from tests.bench.files.report import OURS, Freshness, Report, Sample
from tests.bench.files.runner import Peer, PeerFailed, Plan, Run
from tests.bench.instance import Instance, InstanceFailed
from tests.bench.machine import Devices
from tests.bench.program import say
from tests.free_ports import free_port

VM_PEERS = (OURS, "sshfs", "virtiofs", "ext4")

EDITS = "edits"
"""What ``--only`` calls them."""

EDITING_LIMIT = 60.0
"""Seconds for the edits on one peer. Those that ask only now and then see a handful in that time."""

VM_PROCEDURE = (
    "cold: in a mount made anew in this round (but ext4), of files not looked at since, with the guest's caches "
    "dropped just before; the host's caches are warm for all"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.files", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples of each workload on each peer")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORKLOAD", help="wildcards; repeatable"
    )
    parser.add_argument(
        "--edits", type=int, default=1000, help="seen on each peer; with --only, only if 'edits' is named"
    )
    parser.add_argument("--peers", default="", help=f"separated by commas, of {','.join(VM_PEERS)}")
    parser.add_argument("--without-vm", action="store_true", help="on this host, without a VM")
    parser.add_argument("--full", action="store_true", help="full sizes in emulation, too (most of an hour)")
    parser.add_argument("--small", action="store_true", help="the sizes for emulation everywhere")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin nothing after this (default 30)")
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds for a workload on a peer, in all rounds"
    )
    parser.add_argument("--accel", default="auto", help="as of agentctl up")
    parser.add_argument("--cpus", type=int, default=2, help="of the VM")
    parser.add_argument("--json", type=Path, help="where to write every sample (default: in --work)")
    parser.add_argument("--work", type=Path, help="directory to work in (default ~/.cache/agentctl-bench)")
    chosen = parser.parse_args(arguments)
    known = local.PEERS if chosen.without_vm else VM_PEERS
    chosen.names = [name for name in chosen.peers.split(",") if name] or list(known)
    if unknown := [name for name in chosen.names if name not in known]:
        parser.error(f"unknown peer {unknown[0]}; there are {', '.join(known)}")
    if chosen.only and EDITS not in chosen.only:
        chosen.edits = 0
    patterns = [pattern for pattern in chosen.only if pattern != EDITS]
    chosen.workloads = runner.select(patterns) if patterns or not chosen.only else ()
    if not chosen.workloads and not chosen.edits:
        parser.error("no workload matches --only")
    if chosen.full and chosen.small:
        parser.error("--full and --small exclude each other")
    if chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    return chosen


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run on one machine gave."""

    peers: list[Peer]
    unavailable: dict[str, str]
    environment: dict[str, str]
    sizes: trees.Sizes
    samples: list[Sample]
    freshness: list[Freshness]
    out_of_time: bool


@contextlib.contextmanager
def directory(chosen: argparse.Namespace) -> Iterator[Path]:
    """The working directory. Results and downloaded packages stay in it, everything else goes."""
    with program.directory(chosen.work) as path:
        shared = path / "share"
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(shared, ignore_errors=True)
            shutil.rmtree(path / "copies", ignore_errors=True)


# --- in the VM -------------------------------------------------------------------------------------


def in_vm(chosen: argparse.Namespace, work: Path) -> Outcome:
    instances.require("git", "tar", "setpriv")
    unavailable = {name: reason for name in chosen.names if (reason := peers.obstacle(name))}
    names = [name for name in chosen.names if name not in unavailable]
    shared = work / "share"
    ssh_port = free_port()
    devices = Devices(
        qemu=str(find_qemu()),
        ports=((ssh_port, ssh.PORT),),
        virtiofsd=peers.virtiofsd(shared) if "virtiofs" in names else (),
        socket=str(work / "virtiofs.sock"),
        log=str(work / "virtiofsd.log"),
    )
    arguments = ["--cpus", str(chosen.cpus), "--memory", "2GiB", "--disk", "20GiB", "--accel", chosen.accel]
    if OURS in names and not instances.can_mount(Instance(work)):
        unavailable[OURS] = "this agentctl has no mounts"
        names.remove(OURS)
    if OURS in names:
        arguments += ["--mount", f"{shared}:{peers.MOUNTS}/{OURS}"]
    say("starting the VM")
    with instances.running(work, devices, arguments) as instance:
        return _measure_in(instance, chosen, shared, ssh_port, names, unavailable)


def _measure_in(
    instance: Instance,
    chosen: argparse.Namespace,
    shared: Path,
    ssh_port: int,
    names: list[str],
    unavailable: dict[str, str],
) -> Outcome:
    accelerator = str(instance.status().get("accelerator", "unknown"))
    sizes = _sizes(chosen, emulated=accelerator == "tcg")
    say(f"making the files, and the peers ({accelerator})")
    trees.make(shared, names, sizes)
    found, missing = peers.offered(instance, shared, ssh_port, names)
    with contextlib.ExitStack() as stack:
        for peer in found:
            if isinstance(peer, peers.Sshfs):
                stack.callback(peer.close)
        driver = stack.enter_context(_driver_in(instance, sizes))
        plan = Plan(chosen.rounds, chosen.workloads, peers.DATA, True, chosen.minutes * 60, chosen.patience)
        samples, late = take(plan, found, driver)
        freshness = watch(chosen, found, shared, _watcher_in(instance))
        environment = {
            **program.host(find_qemu()),
            "accelerator": accelerator,
            "guest": f"{driver.environment['kernel']}, {driver.environment['cpus']} cpus, 2 GiB",
        }
    return Outcome(found, {**unavailable, **missing}, environment, sizes, samples, freshness, late)


def _watcher_in(instance: Instance) -> Watcher:
    command = ["python3", "-u", _bring(instance, "watcher.py")]
    return Watcher(lambda: instance.spawn_in_guest(*command, log=instance.directory / "watcher.log"))


def _bring(instance: Instance, name: str) -> str:
    """A script of this folder into the guest; where it is there."""
    script = Path(__file__).with_name(name).read_bytes()
    instance.guest(f"mkdir -p /run/bench && cat >/run/bench/{name}", input=script)
    return f"/run/bench/{name}"


def _driver_in(instance: Instance, sizes: trees.Sizes) -> Driver:
    script = _bring(instance, "workloads.py")
    command = ["env", "BENCH_SCRATCH=/run/bench", "python3", "-u", script, sizes.to_json()]
    return Driver(lambda: instance.spawn_in_guest(*command, log=instance.directory / "driver.log"))


# --- without a VM ----------------------------------------------------------------------------------


def on_host(chosen: argparse.Namespace, work: Path) -> Outcome:
    instances.require("git", "tar", "setpriv", "unshare")
    sizes = _sizes(chosen, emulated=False)
    trees.make(work / "share", chosen.names, sizes)
    with contextlib.ExitStack() as stack:
        found, unavailable = local.offered(stack, work, chosen.names)
        driver = stack.enter_context(local.driver(work, sizes))
        plan = Plan(
            chosen.rounds, chosen.workloads, str(work / "copies"), drop=False, limit=chosen.minutes * 60
        )
        samples, late = take(plan, found, driver)
        freshness = watch(chosen, found, work / "share", local.watcher(work))
    return Outcome(found, unavailable, program.host(), sizes, samples, freshness, late)


# --- both ------------------------------------------------------------------------------------------


def _sizes(chosen: argparse.Namespace, *, emulated: bool) -> trees.Sizes:
    small = chosen.small or (emulated and not chosen.full)
    return trees.EMULATED if small else trees.FULL


def take(plan: Plan, found: list[Peer], driver: Driver) -> tuple[list[Sample], bool]:
    if not plan.workloads:
        return [], False
    run = Run(plan, found, driver.ask, say)
    samples = []
    for sample in run.samples():
        samples.append(sample)
        say(f"  {sample.workload:16} {sample.peer:9} {sample.error or f'{sample.seconds:.4f}'}")
    return samples, run.out_of_time


def watch(chosen: argparse.Namespace, found: list[Peer], shared: Path, watcher: Watcher) -> list[Freshness]:
    """Of the peers that have the host's files."""
    if not chosen.edits:
        return []
    with watcher:
        return list(_freshness(chosen, found, shared, watcher))


def _freshness(
    chosen: argparse.Namespace, found: list[Peer], shared: Path, watcher: Watcher
) -> Iterator[Freshness]:
    for peer in found:
        if peer.name == "ext4":
            continue
        try:
            peer.mount()
        except PeerFailed as error:
            yield Freshness(peer.name, 0, error=str(error))
            continue
        host, guest = shared / peer.name / "edited", f"{peer.own}/edited"
        one = measure(peer.name, host, guest, watcher, chosen.edits, EDITING_LIMIT)
        say(f"  {EDITS:16} {peer.name:9} {one.error or f'{one.p50:.4f} {one.p99:.4f}'}")
        yield one


def _report(chosen: argparse.Namespace, outcome: Outcome, started: float) -> Report:
    bad = any(one.error for one in [*outcome.samples, *outcome.freshness])
    bad |= bool(report.disagreements(outcome.samples))
    return report.complete(
        Report(
            command=["python", "-m", "tests.bench.files", *sys.argv[1:]],
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            seconds=round(time.time() - started, 1),
            rounds=chosen.rounds,
            peers=[peer.name for peer in outcome.peers],
            workloads=list(chosen.workloads),
            environment=outcome.environment,
            sizes=dataclasses.asdict(outcome.sizes),
            procedure=local.PROCEDURE if chosen.without_vm else VM_PROCEDURE,
            unavailable=outcome.unavailable,
            complete=not bad and not outcome.out_of_time,
            samples=outcome.samples,
            freshness=outcome.freshness,
        )
    )


def main() -> int:
    chosen = parse()
    if chosen.without_vm:
        local.enter_namespace("tests.bench.files")
    program.end_on_signals()
    started = time.time()
    try:
        with directory(chosen) as work:
            outcome = on_host(chosen, work) if chosen.without_vm else in_vm(chosen, work)
            found = _report(chosen, outcome, started)
            path = (
                chosen.json or work / f"files-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}.json"
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
