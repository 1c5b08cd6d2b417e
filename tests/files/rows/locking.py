"""flock(2) and fcntl(2) locks between processes."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time

from .table import Helper, attempt, in_child, opened, row, rows, write_file

EX, SH, UN, NB = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN, fcntl.LOCK_NB
OFD_SETLK = 37
FLOCK = struct.Struct("hhqqi4x")


def try_flock(kind: int) -> object:
    with opened("file") as fd:
        return attempt(fcntl.flock, fd, kind | NB)


def try_range(kind: int, length: int = 0, start: int = 0) -> object:
    with opened("file") as fd:
        return attempt(fcntl.lockf, fd, kind | NB, length, start)


def others(call: object, *arguments: object) -> object:
    return in_child(lambda: call(*arguments))  # type: ignore[operator]


@rows("flock held, tried", [(f"{one} {two}", one, two) for one in ("EX", "SH") for two in ("EX", "SH")])
def _flocks(one: str, two: str) -> object:
    kinds = {"EX": EX, "SH": SH}
    write_file("file")
    with opened("file") as fd:
        fcntl.flock(fd, kinds[one])
        while_held = others(try_flock, kinds[two])
        fcntl.flock(fd, UN)
        return [while_held, others(try_flock, kinds[two])]


@row
def flock_is_of_the_open_file() -> object:
    write_file("file")
    with opened("file") as one:
        copy = os.dup(one)
        fcntl.flock(one, EX)
        outcomes = [try_flock(EX), attempt(fcntl.flock, copy, EX | NB)]
        os.close(one)
        outcomes.append(try_flock(EX))
        os.close(copy)
        return [*outcomes, try_flock(EX)]


@row
def flock_is_changed_in_place() -> object:
    write_file("file")
    with opened("file") as fd:
        fcntl.flock(fd, SH)
        shared = others(try_flock, SH)
        fcntl.flock(fd, EX)
        exclusive = others(try_flock, SH)
        fcntl.flock(fd, SH)
        return [shared, exclusive, others(try_flock, SH)]


@row
def flock_of_a_descriptor_for_reading_and_of_a_directory() -> object:
    write_file("file")
    with opened("file", os.O_RDONLY) as fd, opened(".", os.O_RDONLY) as directory:
        return [attempt(fcntl.flock, fd, EX | NB), attempt(fcntl.flock, directory, EX | NB)]


@row
def flock_ends_with_its_holder() -> object:
    write_file("file")

    def hold(step: object) -> None:
        with opened("file") as fd:
            fcntl.flock(fd, EX)
            step()  # type: ignore[operator]

    with Helper(hold) as holder:
        holder.wait()
        held = try_flock(EX)
        holder.end(kill=True)
        return [held, try_flock(EX)]


@row
def flock_is_waited_for() -> object:
    write_file("file")

    def wait(step: object) -> None:
        with opened("file") as fd:
            step()  # type: ignore[operator]
            fcntl.flock(fd, EX)
            os.write(fd, b"waiter")

    with opened("file") as fd, Helper(wait) as waiter:
        fcntl.flock(fd, EX)
        waiter.wait()
        waiter.go()
        time.sleep(0.1)
        os.write(fd, b"holder")
        fcntl.flock(fd, UN)
        status = waiter.end()
        return [status, os.pread(fd, 10, 0).decode()]


@row
def a_waiter_can_be_interrupted() -> object:
    write_file("file")

    class Alarm(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Alarm

    def wait() -> object:
        signal.signal(signal.SIGALRM, interrupt)
        outcomes = []
        for call in (fcntl.flock, fcntl.lockf):
            with opened("file") as fd:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                try:
                    call(fd, EX)
                except Alarm:
                    outcomes.append("interrupted")
                else:
                    outcomes.append("locked")
        return outcomes

    with opened("file") as fd:
        fcntl.flock(fd, EX)
        fcntl.lockf(fd, EX)
        return in_child(wait)


RANGES = {
    "whole, whole": ((EX, 0, 0), (EX, 0, 0)),
    "apart": ((EX, 10, 0), (EX, 10, 10)),
    "overlapping": ((EX, 10, 0), (EX, 10, 9)),
    "to the end, beyond": ((EX, 0, 100), (EX, 1, 1 << 40)),
    "before": ((EX, 0, 100), (EX, 100, 0)),
    "shared, shared": ((SH, 0, 0), (SH, 0, 0)),
    "shared, exclusive": ((SH, 0, 0), (EX, 0, 0)),
}


@rows("fcntl", [(name, *locks) for name, locks in RANGES.items()])
def _ranges(held: tuple[int, int, int], tried: tuple[int, int, int]) -> object:
    write_file("file", b"x" * 200)
    with opened("file") as fd:
        fcntl.lockf(fd, *held)
        outcome = others(try_range, *tried)
        fcntl.lockf(fd, UN)
        return [outcome, others(try_range, *tried)]


@row
def fcntl_parts_are_given_back() -> object:
    write_file("file", b"x" * 100)
    with opened("file") as fd:
        fcntl.lockf(fd, EX, 30, 0)
        fcntl.lockf(fd, UN, 10, 10)
        return [others(try_range, EX, 10, start) for start in (0, 10, 20)]


@row
def fcntl_says_who_holds() -> object:
    write_file("file", b"x" * 100)
    own = os.getpid()

    def ask() -> object:
        with opened("file") as fd:
            answer = fcntl.fcntl(fd, fcntl.F_GETLK, FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        kind, _, start, length, pid = FLOCK.unpack(answer)
        return [kind == fcntl.F_WRLCK, start, length, pid == own]

    with opened("file") as fd:
        fcntl.lockf(fd, EX, 20, 5)
        held = in_child(ask)
        fcntl.lockf(fd, UN)
        return [held, in_child(ask)]


@row
def fcntl_locks_end_when_any_descriptor_is_closed() -> object:
    write_file("file")
    with opened("file") as fd:
        fcntl.lockf(fd, EX)
        held = others(try_range, EX)
        os.close(os.open("file", os.O_RDONLY))
        return [held, others(try_range, EX)]


@row
def fcntl_locks_are_not_inherited() -> object:
    write_file("file")
    with opened("file") as fd:
        fcntl.lockf(fd, EX)
        return in_child(lambda: attempt(fcntl.lockf, fd, EX | NB))


@row
def fcntl_locks_end_with_their_holder() -> object:
    write_file("file")

    def hold(step: object) -> None:
        with opened("file") as fd:
            fcntl.lockf(fd, EX)
            step()  # type: ignore[operator]

    with Helper(hold) as holder:
        holder.wait()
        held = try_range(EX)
        holder.end(kill=True)
        return [held, try_range(EX)]


@row
def fcntl_needs_the_right_descriptor() -> object:
    write_file("file")
    with opened("file", os.O_RDONLY) as reader, opened("file", os.O_WRONLY) as writer:
        return [attempt(fcntl.lockf, fd, kind | NB) for fd in (reader, writer) for kind in (EX, SH)]


@row
def locks_of_an_open_file_description() -> object:
    write_file("file")
    request = FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
    with opened("file") as one, opened("file") as two:
        held = [attempt(lambda fd=fd: fcntl.fcntl(fd, OFD_SETLK, request) and None) for fd in (one, two)]
        os.close(os.open("file", os.O_RDONLY))
        still = attempt(lambda: fcntl.fcntl(two, OFD_SETLK, request) and None)
        os.close(one)
        return [held, still, attempt(lambda: fcntl.fcntl(two, OFD_SETLK, request) and None)]


@row
def a_count_kept_under_a_lock() -> object:
    write_file("file", b"0")

    def count() -> None:
        for _ in range(25):
            with opened("file") as fd:
                fcntl.flock(fd, EX)
                value = int(os.pread(fd, 20, 0))
                os.pwrite(fd, b"%d" % (value + 1), 0)

    children = [Helper(lambda step: count()) for _ in range(3)]
    statuses = [child.end() for child in children]
    with opened("file") as fd:
        return [statuses, int(os.pread(fd, 20, 0))]
