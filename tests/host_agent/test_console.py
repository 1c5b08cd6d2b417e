"""The console watcher: stages, panics and stalls, by any split of the bytes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.console import (
    LIMITS,
    MAX_LINE,
    TAIL_LINES,
    BootStage,
    ConsoleEvent,
    ConsoleWatcher,
    Farewell,
    Panicked,
    StageLimit,
    StageReached,
    Stalled,
    find_farewell,
    find_panic,
    limits_for,
)
from provision.machine import Accelerator

BOOT = (
    b"\x1bc\x1b[?7l\x1b[2J\r\n"
    b"[    0.000000] Linux version 6.12.107+deb13-cloud-amd64 (debian-kernel@lists.debian.org)\r\n"
    b"[    0.088988] Kernel command line: console=ttyS0 panic=-1\r\n"
    b"agentctl-stage: initrd\r\n"
    b"[    3.100000] EXT4-fs (vda): mounted filesystem\r\n"
    b"agentctl-stage: root\r\n"
    b"[\x1b[0;32m  OK  \x1b[0m] Started \xc3\xbcber.\r\n"
    b"[    5.100000][    T1] systemd[1]: agentctl-stage: init\r\n"
    b"agentctl-stage: agent\r\n"
)
STAGES = [BootStage.KERNEL, BootStage.INITRD, BootStage.ROOT, BootStage.INIT, BootStage.AGENT]
PANIC = (
    b"[    1.793317] Oops: double fault: 0000 [#1] PREEMPT SMP NOPTI\r\n"
    b"[    1.793317] Kernel panic - not syncing: Fatal exception in interrupt\r\n"
    b"[    1.793317] Kernel Offset: 0x9600000 from 0xffffffff81000000\r\n"
    b"[    1.793317] ---[ end Kernel panic - not syncing: Fatal exception in interrupt ]---\r\n"
)
KVM = limits_for(Accelerator.KVM)


def watcher(now: float = 0.0) -> ConsoleWatcher:
    return ConsoleWatcher(KVM, now)


def test_stages_come_in_order_with_their_times() -> None:
    watch = watcher(now=100.0)
    events: list[ConsoleEvent] = []
    for number, line in enumerate(BOOT.splitlines(keepends=True)):
        events += watch.receive_data(line, 100.0 + number)
    assert [type(event) for event in events] == [StageReached] * 5
    assert events == [
        StageReached(stage, seconds) for stage, seconds in zip(STAGES, (1.0, 3.0, 5.0, 7.0, 8.0), strict=True)
    ]
    assert watch.stage is BootStage.AGENT


@given(st.lists(st.integers(0, len(BOOT + PANIC))))
def test_any_split_gives_the_same_events(cuts: list[int]) -> None:
    data = BOOT + PANIC
    watch = watcher()
    events: list[ConsoleEvent] = []
    for start, end in itertools.pairwise([0, *sorted(cuts), len(data)]):
        events += watch.receive_data(data[start:end], 1.0)
    assert events == [
        *(StageReached(stage, 1.0) for stage in STAGES),
        Panicked("Kernel panic - not syncing: Fatal exception in interrupt"),
    ]
    assert "[  OK  ] Started über." in watch.tail


@given(st.lists(st.binary(max_size=50) | st.just(b"\n" * 30) | st.just(b"x" * (MAX_LINE - 1))))
def test_any_bytes_stay_within_bounds(pieces: list[bytes]) -> None:
    watch = watcher()
    for piece in pieces:
        watch.receive_data(piece, 1.0)
    assert len(watch.tail) <= TAIL_LINES
    assert all(len(line) <= MAX_LINE for line in watch.tail)


def test_a_stage_is_reached_once_and_never_left_backwards() -> None:
    watch = watcher()
    assert watch.receive_data(b"agentctl-stage: root\n", 1.0) == [StageReached(BootStage.ROOT, 1.0)]
    assert watch.receive_data(b"agentctl-stage: root\nagentctl-stage: initrd\nLinux version 6\n", 2.0) == []


@pytest.mark.parametrize(
    "line",
    [
        b"agentctl-stage: reboot\n",
        b"agentctl-stage: rooted\n",
        b"agentctl-stage: kernel\n",
        b"agentctl-stage: \n",
        b"[    1.0] systemd: running on Linux version 6.12\n",
    ],
)
def test_other_lines_are_no_stages(line: bytes) -> None:
    assert watcher().receive_data(line, 1.0) == []


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            b"[    1.0] Kernel panic - not syncing: VFS: no root\r\n",
            "Kernel panic - not syncing: VFS: no root",
        ),
        (
            b"[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b\n",
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
        ),
        (b"garb[ 2.0] ---[ end Kernel panic - not ]---\n", "---[ end Kernel panic - not ]---"),
    ],
)
def test_a_panic_is_told_once(line: bytes, text: str) -> None:
    watch = watcher()
    assert watch.receive_data(line, 1.0) == [Panicked(text)]
    assert watch.receive_data(PANIC, 1.0) == []
    assert watch.check(1e9) is None


def test_an_oops_is_not_the_end() -> None:
    assert watcher().receive_data(b"[    1.0] Oops: 0000 [#1] SMP\n", 1.0) == []


def test_a_panic_after_the_boot_is_told() -> None:
    watch = watcher()
    watch.booted()
    assert [type(event) for event in watch.receive_data(PANIC, 1e6)] == [Panicked]


def test_a_silent_stage_stalls_and_says_so_once() -> None:
    watch = watcher(now=50.0)
    watch.receive_data(BOOT[: BOOT.index(b"agentctl-stage: initrd")], 51.0)
    assert watch.deadline == 51.0 + KVM[BootStage.KERNEL].quiet
    assert watch.check(watch.deadline - 0.001) is None
    stalled = watch.check(watch.deadline)
    assert stalled == Stalled(BootStage.KERNEL, KVM[BootStage.KERNEL].quiet, silent=True)
    assert stalled.reason == "the guest said nothing for 6 s in stage kernel"
    assert watch.check(1e9) is None


def test_output_defers_a_stall_but_not_for_ever() -> None:
    watch = watcher()
    watch.receive_data(b"Linux version 6\n", 0.0)
    limit = KVM[BootStage.KERNEL]
    now = 0.0
    while now < limit.total - 1:
        now += limit.quiet / 2
        watch.receive_data(b"[ 1.0] a job is running\n", now)
        if now < limit.total:
            assert watch.check(now) is None
    stalled = watch.check(limit.total)
    assert stalled == Stalled(BootStage.KERNEL, limit.total, silent=False)
    assert stalled.reason == "the guest got no further for 20 s in stage kernel"


def test_a_new_stage_starts_its_limits_anew() -> None:
    watch = watcher()
    watch.receive_data(b"Linux version 6\n", 1.0)
    watch.receive_data(b"agentctl-stage: initrd\n", 5.0)
    limit = KVM[BootStage.INITRD]
    assert watch.deadline == 5.0 + min(limit.quiet, limit.total)


def test_other_progress_defers_a_stall() -> None:
    watch = watcher()
    watch.receive_data(b"agentctl-stage: agent\n", 0.0)
    quiet = KVM[BootStage.AGENT].quiet
    watch.progress(quiet - 1)
    assert watch.check(quiet + 1) is None


def test_nothing_stalls_once_booted() -> None:
    watch = watcher()
    watch.booted()
    assert watch.deadline == math.inf
    assert watch.check(1e9) is None


def test_an_empty_read_is_no_progress() -> None:
    watch = watcher()
    before = watch.deadline
    assert watch.receive_data(b"", 3.0) == []
    assert watch.deadline == before


def test_every_stage_has_limits_and_tcg_ten_times_them() -> None:
    assert set(LIMITS) == set(BootStage)
    for stage, limit in limits_for(Accelerator.TCG).items():
        assert limit == StageLimit(LIMITS[stage].quiet * 10, LIMITS[stage].total * 10)
        assert 0 < limit.quiet <= limit.total


def test_the_tail_is_the_last_lines_and_the_unfinished_one() -> None:
    watch = watcher()
    watch.receive_data(b"".join(b"line %d\r\n" % number for number in range(100)) + b"unfin", 1.0)
    assert watch.tail == [*(f"line {number}" for number in range(100 - TAIL_LINES + 1, 100)), "unfin"]


def test_a_line_without_end_is_cut() -> None:
    watch = watcher()
    watch.receive_data(b"x" * (3 * MAX_LINE + 7), 1.0)
    assert [len(line) for line in watch.tail] == [MAX_LINE, MAX_LINE, MAX_LINE, 7]


def test_find_panic_in_a_log() -> None:
    assert find_panic(BOOT + PANIC) == "Kernel panic - not syncing: Fatal exception in interrupt"
    assert find_panic(BOOT) == ""


@pytest.mark.parametrize(
    ("said", "farewell"),
    [
        (b"[   12.345678] reboot: Restarting system\r\n", Farewell.REBOOT),
        (b"[   12.3][  T812] reboot: Restarting system with command 'now'\r\n", Farewell.REBOOT),
        (b"[   12.345678] reboot: Power down\r\n", Farewell.POWER_OFF),
        (b"[ 1.0] reboot: Power down\r\n[ 2.0] reboot: Restarting system\r\n", Farewell.REBOOT),
        (b"systemd-shutdown[1]: Rebooting.\r\n", None),
        (b"", None),
    ],
)
def test_a_kernel_says_why_it_goes(said: bytes, farewell: Farewell | None) -> None:
    assert find_farewell(BOOT + said) is farewell
