"""Looks after a VM that runs: whether QEMU had to stop it, whether its disk has room, and when it goes on.

The law: what QEMU tells is acted upon at once, and what it does not tell (a host agent that was away, a QEMU without
a second monitor) is seen at the next look all the same. Whatever cannot be asked now costs nothing but that look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import trio

from host_agent import sizes
from host_agent.disk_room import LOW_HINT, DiskRoom, DiskState, little_left
from host_agent.qmp import QmpClosed, QmpError
from host_agent.vm import VirtualMachine

logger = logging.getLogger(__name__)

INTERVAL: Final = 5.0
"""Seconds between two looks."""

RESUME_SPACE: Final = 1 << 30
"""Free bytes on the host's disk with which a guest that was stopped for want of them goes on."""

DISK_FULL: Final = "the host's disk is full, and the VM waits"
DISK_FULL_HINT: Final = f"make room; it goes on by itself once {sizes.show(RESUME_SPACE)} are free"


class Say(Protocol):
    def __call__(self, kind: str, message: str, **fields: str) -> None: ...


class VmWatch:
    """``size`` is asked for the size of the data disk; ``resumed`` is called when a VM that stood still goes on."""

    def __init__(self, disk: Path, size: Callable[[], int], say: Say, resumed: Callable[[], None]) -> None:
        self._disk = disk
        self._size = size
        self._say = say
        self._resumed = resumed
        self._look = trio.Event()
        self.state = DiskState.ROOMY

    async def run(self, vm: VirtualMachine) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, vm)
            while True:
                await self._look_at(vm)
                self._look = trio.Event()
                with trio.move_on_after(INTERVAL):
                    await self._look.wait()

    async def _listen(self, vm: VirtualMachine) -> None:
        silent = False
        while True:
            try:
                async with vm.events() as events:
                    silent = False
                    async for event in events:
                        if event.name == "RESUME":
                            self._resumed()
                        if event.name in ("RESUME", "STOP"):
                            self._look.set()
            except QmpClosed as error:
                if not silent:  # one of an older agentctl never will
                    logger.info("QEMU does not tell what happens: %s", error)
                silent = True
            await trio.sleep(INTERVAL)

    async def _look_at(self, vm: VirtualMachine) -> None:
        try:
            stopped = await vm.run_state() == "io-error"
            room = DiskRoom.of(self._disk, self._size())
            if stopped and room.free >= RESUME_SPACE:
                await vm.resume()
                stopped = False
        except (QmpClosed, QmpError, OSError) as error:
            logger.info("how the VM and its disk are is not known: %s", error)
            return
        self._note(room.judged(self.state, stopped=stopped), room.free)

    def _note(self, state: DiskState, free: int) -> None:
        """Tell each change once; of a disk that is not full any more, and has little room, both."""
        before, self.state = self.state, state
        if state is before:
            return
        if state is DiskState.FULL:
            self._say("disk-full", DISK_FULL, hint=DISK_FULL_HINT)
            return
        if before is DiskState.FULL:
            self._say("disk-has-room", "there is room on the disk again; the VM goes on")
        elif state is DiskState.ROOMY:
            self._say("disk-has-room", f"there is room on this machine's disk again: {sizes.show(free)}")
        if state is DiskState.LOW:
            self._say("disk-low", little_left(free), hint=LOW_HINT)
