"""A file server between a guest and a host agent that a test plays, all in one process; the folders are real."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from fileserver import prompt
from fileserver.control import GetShares, SharedFolder, ShareState
from fileserver.journal import Journal
from fileserver.keepsakes import Keepsakes
from fileserver.tree import Outcome, Tree
from host_agent.descriptor_store import DescriptorStore
from host_agent.fileserver.server import FileServer
from protocol.bulk import SLOT, Bulk
from protocol.files import ROOT, Create, Entry, FileCall
from protocol.link import Link, SerialChannel
from tests.fileserver.peers import (
    SHARE,
    SOON,
    HostAgent,
    Kernel,
    Port,
    control_pair,
    host_agent,
    port,
)


def memory(slots: int) -> tuple[Bulk, Bulk]:
    """What the host and the guest have of ``slots`` on each side."""
    half = slots * SLOT
    view = memoryview(bytearray(2 * half))
    host, guest = Bulk(), Bulk()
    host.attach(view[:half], view[half:])
    guest.attach(view[half:], view[:half])
    host.accept = lambda extents, mark: True
    return host, guest


@dataclass
class Scene:
    """A file server with its neighbours. ``root`` is share ``SHARE``."""

    root: Path
    folder: SharedFolder
    port: Port
    agent: HostAgent
    server: FileServer
    journal: Journal
    store: DescriptorStore
    scope: trio.CancelScope


@asynccontextmanager
async def scene(place: Path, bulk: Bulk | None = None, **options: Any) -> AsyncIterator[Scene]:
    """Everything but the guest, and nothing is shared yet."""
    root = place / "root"
    root.mkdir(exist_ok=True)
    journal = Journal(place / "journal")
    ours, theirs = control_pair()
    control = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    with closing(DescriptorStore()) as store, store.opened() as (kept, theirs):
        keepsakes = Keepsakes(theirs)
        async with port(place) as opened, trio.open_nursery() as nursery:
            nursery.start_soon(store.follow, kept)
            server = FileServer(opened.path, control, journal, keepsakes=keepsakes, bulk=bulk)
            nursery.start_soon(server.run)
            async with host_agent(ours) as agent:
                folder = SharedFolder(SHARE, str(root), "/guest", **options)
                yield Scene(root, folder, opened, agent, server, journal, store, nursery.cancel_scope)
            nursery.cancel_scope.cancel()
        keepsakes.close()
    journal.close()


@dataclass
class Connected:
    """A scene with a guest in it."""

    scene: Scene
    kernel: Kernel
    channel: SerialChannel

    @property
    def root(self) -> Path:
        return self.scene.root

    def session(self) -> AbstractAsyncContextManager[Link]:
        return self.kernel.session(self.channel)

    async def state(self) -> ShareState:
        return (await self.scene.agent.link.request(GetShares())).shares[0]

    async def create(self, name: bytes) -> Entry:
        return await self.kernel.ask(Create(SHARE, self.kernel.unique(), ROOT, name, 0o644, os.O_EXCL))


@asynccontextmanager
async def connected(
    place: Path, memory: tuple[Bulk, Bulk] | None = None, **options: Any
) -> AsyncIterator[Connected]:
    async with waiting(place, memory, **options) as guest, guest.session():
        yield guest


@asynccontextmanager
async def waiting(
    place: Path, memory: tuple[Bulk, Bulk] | None = None, **options: Any
) -> AsyncIterator[Connected]:
    """A scene with a guest that has not begun a session yet."""
    host, guest = memory or (None, None)
    async with scene(place, host, **options) as made:
        await made.agent.serve(made.folder)
        yield Connected(made, Kernel(bulk=guest), await made.port.accept())


class Gate:
    """Calls of ``kind`` begin, in threads, and wait until ``open``; those that have begun are in ``begun``. ``done``:
    they are done, and it is their answers that wait."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[FileCall[Any]],
        share: int = SHARE,
        *,
        done: bool = False,
    ) -> None:
        self.begun: list[Any] = []
        self._open = threading.Event()
        perform = Tree.perform

        def wait(tree: Tree, call: Any, payload: bytes = b"") -> Outcome:
            outcome = perform(tree, call, payload) if done else None
            if type(call) is kind and call.share == share:
                self.begun.append(call)
                assert self._open.wait(SOON)
            return outcome or perform(tree, call, payload)

        monkeypatch.setattr(Tree, "perform", wait)
        monkeypatch.setattr(prompt, "KINDS", prompt.KINDS - {kind})

    def open(self) -> None:
        self._open.set()
