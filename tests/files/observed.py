"""An agent of the files plane, the real one, that says on SIGUSR1 how its memory is used, and what the kernel has asked.

    python3 -m tests.files.observed [--patience SECONDS] [--memory PATH OFFSET] [--lose N] [--listen] [--attached]
                                    [--packed] SAY MODULE [ARGUMENT ...]

``SAY`` is the file that it says it in (``memory.Use``). ``PATH`` has the guest's file from byte ``OFFSET`` on, instead
of /dev/pmem0. ``SECONDS``: how long the guest waits for an absent host; that it is gone is noticed sooner, then.
With ``--listen`` the guest does not connect to its socket, but is who is connected to: nothing is between the two then.
With ``--attached`` it is on a machine that is no VM, and with ``--packed`` what travels is packed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import mmap
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import trio

from protocol import bulk
from protocol.packedport import PackedPort
from protocol.region import FILE_SIZE, Region
from protocol.serial import SocketPort


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patience", type=float)
    parser.add_argument("--memory", nargs=2)
    parser.add_argument("--lose", type=int)
    parser.add_argument("--listen", action="store_true")
    parser.add_argument("--attached", action="store_true")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("say", type=Path)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    _observe(options.say, _count_requests() if options.module.startswith("guest_agent") else [0])
    if options.memory is not None:
        _map(options.memory[0], int(options.memory[1]))
    if options.patience is not None:
        _be_impatient(options.patience)
    if options.lose is not None:
        _lose(options.lose)
    if options.listen:
        _listen()
    if options.attached:
        _attach(options.packed)
    sys.argv[1:] = options.arguments
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)


def _count_requests() -> list[int]:
    from guest_agent.fuse.filesystem import Filesystem

    handle, handled = Filesystem.handle, [0]

    @functools.wraps(handle)
    def count(self: Filesystem, request: Any) -> None:
        handled[0] += 1
        handle(self, request)

    Filesystem.handle = count  # type: ignore[method-assign]
    return handled


def _observe(where: Path, requests: list[int]) -> None:
    all_of_them: list[bulk.Bulk] = []
    received: dict[int, int] = {}
    begin, receive = bulk.Bulk.__init__, bulk.Bulk.receive

    @functools.wraps(begin)
    def register(self: bulk.Bulk) -> None:
        begin(self)
        all_of_them.append(self)

    @functools.wraps(receive)
    def count(self: bulk.Bulk, *reference: Any, **options: Any) -> bulk.Loan:
        received[id(self)] = received.get(id(self), 0) + 1
        return receive(self, *reference, **options)

    def say(*_: object) -> None:
        said = None
        for one in all_of_them:
            if one._slots:
                said = {
                    "active": one.active,
                    "mine": one._mine,
                    "lent": one._theirs,
                    "busy": one._busy,
                    "held": one._held,
                    "frees": one._frees,
                    "old": sum(one._old),
                    "received": received.get(id(one), 0),
                    "requests": requests[0],
                }
        draft = where.with_suffix(".draft")
        draft.write_text(json.dumps(said))
        draft.rename(where)

    bulk.Bulk.__init__ = register  # type: ignore[method-assign]
    bulk.Bulk.receive = count  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, say)


def _map(path: str, offset: int) -> None:
    from guest_agent import bulk_memory

    def open_region() -> tuple[Region, list[int]]:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            region = Region(mmap.mmap(descriptor, FILE_SIZE, flags=mmap.MAP_SHARED, offset=offset))
        finally:
            os.close(descriptor)
        return region, [offset, FILE_SIZE]

    bulk_memory.open_region = open_region  # type: ignore[assignment]


def _listen() -> None:
    from guest_agent import transports

    async def accept_unix(path: Path) -> SocketPort:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with trio.socket.socket(socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen(1)
            host, _ = await listener.accept()
        return SocketPort(trio.SocketStream(host))

    transports.open_unix = accept_unix


def _attach(packed: bool) -> None:
    from guest_agent import transports

    run_agent = transports.run_agent

    def run_off_the_vm(arguments: Any, module: str, port: Path, run: Any) -> int:
        async def run_packed(open_transport: Any) -> None:
            async def open_packed() -> PackedPort:
                return PackedPort(await open_transport())

            await run(open_packed if packed else open_transport, vm=False)

        return run_agent(arguments, module, port, run_packed)

    transports.run_agent = run_off_the_vm


def _be_impatient(seconds: float) -> None:
    import guest_agent.fuse.host
    import protocol.link

    guest_agent.fuse.host.PATIENCE = seconds  # type: ignore[misc]
    defaults = protocol.link.Link.__init__.__kwdefaults__
    assert defaults is not None
    defaults.update(heartbeat=0.5, dead_after=1.5)


def _lose(nth: int) -> None:
    from guest_agent.fuse.mounts import Mounts
    from protocol.files import Changed

    take_back = Mounts.take_back
    heard = 0

    @functools.wraps(take_back)
    def lose(self: Mounts, changed: Changed) -> None:
        nonlocal heard
        heard += 1
        if heard % nth:
            take_back(self, changed)

    Mounts.take_back = lose  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
