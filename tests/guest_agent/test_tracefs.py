from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from guest_agent.tracefs import (
    EVENTS,
    PREFIX,
    VAIN_PAUSE_LONGEST,
    TraceWakes,
    namespace_check,
    open_instance,
    open_wakes,
    remove_leftovers,
)
from guest_agent.udp_closes import open_closes
from protocol.api import Proto

NO_PORTS: frozenset[tuple[Proto, int]] = frozenset()
TCP, UDP = frozenset({Proto.TCP}), frozenset({Proto.UDP})


def own_instances(root: Path) -> list[Path]:
    return list((root / "instances").glob(f"{PREFIX}{os.getpid()}-*"))


async def test_an_instance_lives_as_long_as_the_block(tracing: Path) -> None:
    async with open_wakes(tracing):
        assert len(own_instances(tracing)) == 1
    assert own_instances(tracing) == []


async def test_an_instance_is_removed_when_the_block_is_cancelled(tracing: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_wakes(tracing):
            scope.cancel()
            await trio.sleep_forever()
    assert own_instances(tracing) == []


async def test_listening_wakes_at_once(tracing: Path) -> None:
    async with open_wakes(tracing) as wakes:
        for address in ("127.0.0.1", "::1"):
            with trio.fail_after(5):
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                with socket.create_server((address, 0), family=family) as listener:
                    port = listener.getsockname()[1]
                    assert await wakes.wait(NO_PORTS) >= TCP
                assert Proto.TCP in await wakes.wait({(Proto.TCP, port)})


async def test_udp_wakes_when_it_is_bound_and_when_it_is_closed(tracing: Path) -> None:
    async with open_wakes(tracing) as wakes:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with trio.fail_after(5):
                with socket.socket(family, socket.SOCK_DGRAM) as server:
                    server.bind((address, 0))
                    while await wakes.wait(NO_PORTS) != UDP:  # others may listen on this machine
                        pass
                    port = server.getsockname()[1]
                while await wakes.wait({(Proto.UDP, port)}) != UDP:
                    pass


def test_a_killed_predecessors_instance_is_removed_and_a_living_ones_stays(tracing: Path) -> None:
    program = "from guest_agent.tracefs import *; instance = open_instance(); print(instance.path, flush=True); input()"
    predecessor = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with predecessor:
        assert predecessor.stdout is not None
        path = Path(predecessor.stdout.readline().strip())
        remove_leftovers(tracing / "instances")
        assert path.is_dir()
        predecessor.kill()
    assert path.is_dir()
    ours = open_instance(tracing)
    assert not path.exists()
    ours.close()
    assert not ours.path.exists()


@pytest.fixture
def made_at_boot(tracing: Path) -> Iterator[Path]:
    """An instance as the VM's initrd makes it, under a name of the test's own."""
    path = tracing / "instances" / f"test-at-boot-{os.getpid()}"
    path.mkdir()
    for event in EVENTS:
        (path / "events" / event / "enable").write_text("1")
    yield path
    path.rmdir()


def switches(path: Path) -> set[str]:
    """The events that are on. ``1*`` is on with a trigger, which a filter is not."""
    return {
        str(p.parent.relative_to(path)) for p in path.glob("events/*/*/enable") if p.read_text()[0] == "1"
    }


def test_the_instance_made_at_boot_goes_from_agent_to_agent(tracing: Path, made_at_boot: Path) -> None:
    before = switches(made_at_boot)
    for _ in range(2):
        instance = open_instance(tracing, made_at_boot.name)
        assert instance.path == made_at_boot
        with socket.create_server(("127.0.0.1", 0)):
            assert select.select([instance.pipe], [], [], 5)[0]
            assert b"sys_listen -> 0x0" in os.read(instance.pipe, 65536)
        instance.close()
        assert switches(made_at_boot) == before


def test_of_two_agents_the_second_makes_an_instance_of_its_own(tracing: Path, made_at_boot: Path) -> None:
    first = open_instance(tracing, made_at_boot.name)
    second = open_instance(tracing, made_at_boot.name)
    assert first.path == made_at_boot != second.path
    second.close()
    first.close()
    assert made_at_boot.is_dir()
    assert not second.path.exists()


def test_without_tracefs_there_is_an_error_and_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        open_instance(tmp_path / "absent" / "tracing")
    (tmp_path / "instances").mkdir()
    with pytest.raises(OSError):
        open_instance(tmp_path)
    assert list((tmp_path / "instances").iterdir()) == []


@contextmanager
def piped() -> Iterator[tuple[TraceWakes, int]]:
    """Wakes that read what the test writes to the descriptor."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open_closes() as closes, closing(TraceWakes(reading, closes, lambda pid: False)) as wakes:
        yield wakes, writing
    os.close(reading)


async def test_a_burst_is_one_wake_and_a_broken_pipe_an_error() -> None:
    with piped() as (wakes, writing):
        os.write(writing, b" x-1 [000] ..... 1.0: sys_listen -> 0x0\n" * 100)
        assert await wakes.wait(NO_PORTS) == TCP
        with trio.move_on_after(0.02) as scope:
            await wakes.wait(NO_PORTS)
        assert scope.cancelled_caught
        os.close(writing)
        with pytest.raises(OSError, match="switched off"):
            await wakes.wait(NO_PORTS)


BIND = b" x-1 [000] ..... 1.0: sys_bind(fd: 3, umyaddr: 7f, addrlen: 10)\n x-1 [000] ..... 1.0: sys_bind -> 0x0\n"
LISTEN = b" x-1 [000] ..... 1.0: sys_listen -> 0x0\n"


async def test_vain_reads_of_udp_become_rare_and_hold_up_nothing_else(autojump_clock: MockClock) -> None:
    with piped() as (wakes, writing):
        moments = []
        for _ in range(12):
            os.write(writing, BIND)
            assert await wakes.wait(NO_PORTS) == UDP
            moments.append(trio.current_time())
            wakes.settle(UDP, frozenset())
        pauses = [later - earlier for earlier, later in pairwise(moments)]
        assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8] + [VAIN_PAUSE_LONGEST] * 6)
        before = trio.current_time()
        os.write(writing, BIND + LISTEN)
        assert await wakes.wait(NO_PORTS) == TCP
        assert trio.current_time() == before
        assert await wakes.wait(NO_PORTS) == UDP
        wakes.settle(UDP, UDP)
        before = trio.current_time()
        os.write(writing, BIND)
        assert await wakes.wait(NO_PORTS) == UDP
        assert trio.current_time() == before
        os.close(writing)


def test_only_a_living_process_elsewhere_is_foreign() -> None:
    foreign = namespace_check()
    assert not foreign(os.getpid())
    assert not foreign(2**22 + 1)  # beyond any pid
