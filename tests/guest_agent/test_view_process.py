"""The process that serves a view is there while it is wanted, whatever kills it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import trio

from guest_agent.view_process import ViewProcess
from protocol.api import ServeView

PATIENCE = 30.0

PROGRAM = """
import os, sys, time
with open(sys.argv[1], "a") as log:
    log.write(f"{os.getpid()}\\n")
time.sleep(1000)
"""


def written(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


async def lives(log: Path, count: int) -> list[int]:
    with trio.fail_after(PATIENCE):
        while True:
            pids = written(log)
            if len(pids) >= count:
                return pids
            await trio.sleep(0.02)


async def is_gone(pid: int) -> None:
    with trio.fail_after(PATIENCE):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            await trio.sleep(0.02)


async def test_it_runs_from_one_word_to_the_other(nursery: trio.Nursery, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = ViewProcess(nursery, [sys.executable, "-c", PROGRAM, str(log)])
    await process.serve_view(ServeView(False))
    await process.serve_view(ServeView())
    await process.serve_view(ServeView())  # of the next session
    (first,) = await lives(log, 1)
    os.kill(first, signal.SIGKILL)
    pids = await lives(log, 2)
    assert pids[0] == first
    await process.serve_view(ServeView(False))
    await is_gone(pids[1])
    await trio.sleep(0.5)
    assert len(await lives(log, 2)) == 2


async def test_one_that_cannot_be_started_is_tried_again(nursery: trio.Nursery, tmp_path: Path) -> None:
    program = tmp_path / "program"
    process = ViewProcess(nursery, [str(program)])
    await process.serve_view(ServeView())
    await trio.sleep(0.1)
    program.write_text(f"#!/bin/sh\necho $$ >>{tmp_path}/log\nexec sleep 1000\n")
    program.chmod(0o755)
    (pid,) = await lives(tmp_path / "log", 1)
    await process.serve_view(ServeView(False))
    await is_gone(pid)
