from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from guest_agent.tracefs import (
    PREFIX,
    TraceWakes,
    namespace_check,
    open_instance,
    open_wakes,
    remove_leftovers,
)

NO_PORTS: frozenset[int] = frozenset()


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
                    await wakes.wait(NO_PORTS)
                await wakes.wait({port})


def test_a_killed_predecessors_instance_is_removed_and_a_living_ones_stays(tracing: Path) -> None:
    program = (
        "from guest_agent.tracefs import *; path, fd = open_instance(); print(path, flush=True); input()"
    )
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
    ours, fd = open_instance(tracing)
    assert not path.exists()
    os.close(fd)
    ours.rmdir()


def test_without_tracefs_there_is_an_error_and_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        open_instance(tmp_path / "absent" / "tracing")
    (tmp_path / "instances").mkdir()
    with pytest.raises(OSError):
        open_instance(tmp_path)
    assert list((tmp_path / "instances").iterdir()) == []


async def test_a_burst_is_one_wake_and_a_broken_pipe_an_error() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    wakes = TraceWakes(reading, lambda pid: False)
    os.write(writing, b" x-1 [000] ..... 1.0: sys_listen -> 0x0\n" * 100)
    await wakes.wait(NO_PORTS)
    with trio.move_on_after(0.02) as scope:
        await wakes.wait(NO_PORTS)
    assert scope.cancelled_caught
    os.close(writing)
    with pytest.raises(OSError, match="switched off"):
        await wakes.wait(NO_PORTS)
    os.close(reading)


def test_only_a_living_process_elsewhere_is_foreign() -> None:
    foreign = namespace_check()
    assert not foreign(os.getpid())
    assert not foreign(2**22 + 1)  # beyond any pid
