"""A file system in memory, served by the code under test. A script; it takes orders on stdin, one a line.

    python memory_filesystem.py serve [--hold] [--promise] SHARE:PATH[:ro][:locks]...
    python memory_filesystem.py adopt

Every share shows the same tree. With --hold, what concerns names that begin with ``held`` or ``looked.at`` is
answered only after the order ``release``. With --promise the kernel may keep all that it is told. Each answer to
an order, and each event, is a line of JSON.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from guest_agent import fdstore
from guest_agent.fuse import abi, bodies, mountinfo, mounting
from guest_agent.fuse.abi import Negotiated, Opcode, Request
from guest_agent.fuse.device import Connection
from guest_agent.fuse.mounting import MountSpec
from guest_agent.fuse.notifier import Notifier, Notifiers
from guest_agent.fuse.promises import Promises
from protocol.files import ATTR, ATTRIBUTES, DIRENT, ENTRY, NAME, SET_MODE, SET_SIZE, Changed

HELLO, HELD, BIG, BROKEN, NEVER = 2, 3, 4, 5, 6
BIG_SIZE = 3 << 20


@dataclass
class Node:
    mode: int
    data: bytearray = field(default_factory=bytearray)
    children: dict[bytes, int] = field(default_factory=dict)


def tree() -> dict[int, Node]:
    names = {b"hello": HELLO, b"held": HELD, b"big": BIG, b"broken": BROKEN}
    return {
        1: Node(stat.S_IFDIR | 0o755, children=names),
        HELLO: Node(stat.S_IFREG | 0o644, bytearray(b"hello\n")),
        HELD: Node(stat.S_IFREG | 0o644, bytearray(b"late\n")),
        BIG: Node(stat.S_IFREG | 0o644, bytearray(os.urandom(1024) * (BIG_SIZE // 1024))),
        BROKEN: Node(stat.S_IFREG | 0o644, bytearray(b"never read\n")),
    }


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


class MemoryFilesystem:
    """One share."""

    def __init__(self, connection: Connection, hold: bool, valid: int) -> None:
        self.connection = connection
        self.valid = valid
        self.nodes = tree()
        self.counts: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.resent: list[str] = []
        self.held: list[Callable[[], None]] = []
        self.hold = hold
        self._operations: dict[int, Callable[[Request], None]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.OPENDIR: lambda request: self.connection.reply(request.unique, bodies.open_out(7)),
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.CREATE: self._create,
            Opcode.MKDIR: self._mkdir,
            Opcode.RENAME2: self._rename,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._unlink,
            Opcode.FSYNC: lambda request: self.connection.reply(request.unique),
            Opcode.RELEASE: lambda request: self.connection.reply(request.unique),
            Opcode.RELEASEDIR: lambda request: self.connection.reply(request.unique),
            Opcode.STATFS: lambda request: self.connection.reply(
                request.unique, bodies.statfs_out(1000, 500, 400, 100, 50, 4096, 255, 4096)
            ),
            Opcode.SETLK: lambda request: self.connection.fail(request.unique, errno.EAGAIN),
        }

    def handle(self, request: Request) -> None:
        name = Opcode(request.opcode).name
        self.counts[name] += 1
        if request.resent:
            self.resent.append(name)
        if request.opcode in abi.NO_REPLY:
            if request.opcode == Opcode.INTERRUPT:
                say(interrupted=bodies.parse_interrupt(request.body))
            return None
        operation = self._operations.get(request.opcode)
        if operation is None:
            return self.connection.fail(request.unique, errno.ENOSYS)
        return operation(request)

    def _maybe_held(self, answer: Callable[[], None], what: str) -> None:
        if self.hold:
            self.held.append(answer)
            say(held=what)
        else:
            answer()

    def attr(self, number: int) -> bytes:
        node = self.nodes[number]
        now = int(time.time())
        size = len(node.data)
        links = 2 if stat.S_ISDIR(node.mode) else 1
        times = now, now, now, 0, 0, 0
        owner = os.getuid(), os.getgid()
        return ATTR.pack(number, size, (size + 511) // 512, *times, node.mode, links, *owner, 0, 4096, 0)

    def _entry(self, request: Request, number: int) -> None:
        self.connection.reply(request.unique, bodies.entry_out(number, self.attr(number), self.valid))

    def _lookup(self, request: Request) -> None:
        name = bodies.parse_name(request.body)
        number = self.nodes[request.nodeid].children.get(name)
        if number is not None:
            return self._entry(request, number)
        if name.startswith(b"looked.at"):
            return self._maybe_held(partial(self.connection.fail, request.unique, errno.ENOENT), "LOOKUP")
        if self.valid & NAME:
            return self.connection.reply(request.unique, bodies.ABSENT)
        return self.connection.fail(request.unique, errno.ENOENT)

    def _getattr(self, request: Request) -> None:
        self.connection.reply(request.unique, bodies.attr_out(self.attr(request.nodeid), self.valid))

    def _setattr(self, request: Request) -> None:
        valid, _, size, _, _, _, _, mode, _, _ = bodies.parse_setattr(request.body)
        node = self.nodes[request.nodeid]
        if valid & SET_SIZE:
            del node.data[size:]
            node.data.extend(bytes(size - len(node.data)))
        if valid & SET_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        self._getattr(request)

    def _readdirplus(self, request: Request) -> None:
        """Names only: of no node anything is said."""
        _, offset, size, _, _, _ = bodies.parse_read(request.body)
        out = b""
        names = sorted(self.nodes[request.nodeid].children.items())
        for place, (name, number) in enumerate(names[offset:], offset + 1):
            record = bytes(ENTRY.size + ATTR.size)
            record += DIRENT.pack(number, place, len(name), self.nodes[number].mode >> 12) + name
            record += bytes(-len(record) % 8)
            if len(out) + len(record) > size:
                break
            out += record
        self.connection.reply(request.unique, out)

    def _read(self, request: Request) -> None:
        _, offset, size, _, _, _ = bodies.parse_read(request.body)
        self.largest["READ"] = max(self.largest["READ"], size)
        data = bytes(self.nodes[request.nodeid].data[offset : offset + size])
        if request.nodeid == BROKEN:
            raise RuntimeError("a bug in the handler")
        answer = partial(self.connection.reply, request.unique, data)
        if request.nodeid == HELD:
            return self._maybe_held(answer, "READ")
        return answer()

    def _write(self, request: Request) -> None:
        _, offset, size, _, _, _, data = bodies.parse_write(request.body)
        self.largest["WRITE"] = max(self.largest["WRITE"], size)
        node = self.nodes[request.nodeid]
        node.data.extend(bytes(max(0, offset - len(node.data))))
        node.data[offset : offset + size] = data
        self.connection.reply(request.unique, bodies.write_out(size))

    def _add(self, parent: int, name: bytes, mode: int) -> int:
        number = self.nodes[parent].children.setdefault(name, max(self.nodes) + 1)
        self.nodes.setdefault(number, Node(mode))
        return number

    def _create(self, request: Request) -> None:
        _, mode, _, _, name = bodies.parse_create(request.body)
        number = self._add(request.nodeid, name, mode)
        self.connection.reply(request.unique, bodies.create_out(number, self.attr(number), 0))

    def _mkdir(self, request: Request) -> None:
        mode, _, name = bodies.parse_mkdir(request.body)

        def answer() -> None:
            self._entry(request, self._add(request.nodeid, name, stat.S_IFDIR | mode))

        if name.startswith(b"held"):
            return self._maybe_held(answer, "MKDIR")
        return answer()

    def _rename(self, request: Request) -> None:
        parent, _flags, name, new_name = bodies.parse_rename2(request.body)
        self.nodes[parent].children[new_name] = self.nodes[request.nodeid].children.pop(name)
        self.connection.reply(request.unique)

    def _unlink(self, request: Request) -> None:
        if self.nodes[request.nodeid].children.pop(bodies.parse_name(request.body), None) is None:
            return self.connection.fail(request.unique, errno.ENOENT)
        return self.connection.reply(request.unique)


class Announced:
    """A notifier that says when something has been written."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier

    def sequence(self, notifications: bytes, then: Callable[[], None]) -> None:
        def written() -> None:
            then()
            say(written=len(notifications))

        self._notifier.sequence(notifications, written)


class Server:
    """All shares of the process, and the orders it takes."""

    def __init__(self, nursery: trio.Nursery, notifiers: Notifiers, hold: bool, valid: int) -> None:
        self._nursery = nursery
        self._notifiers = notifiers
        self._hold = hold
        self._valid = valid
        self._promises: dict[int, Promises] = {}
        self._shares: dict[int, tuple[MemoryFilesystem, Notifier]] = {}

    async def mount(self, spec: MountSpec) -> None:
        connection = await trio.to_thread.run_sync(Connection.mount, spec)
        self._begin(connection)
        await connection.initialized.wait()
        fdstore.store(connection.fd, connection.stored_as().name())
        say(mounted=spec.path, device=connection.device)

    def adopt(self, stored: fdstore.StoredDescriptor) -> None:
        record = fdstore.StoredConnection.parse(stored.name)
        assert record is not None
        path = next(
            m.path for m in mountinfo.mounted_shares(mountinfo.read_mounts()) if m.device == record.device
        )
        spec = MountSpec(record.share, path, host_locks=record.host_locks)
        negotiated = Negotiated(record.minor, record.flags)
        connection = Connection.adopt(stored.fd, spec, negotiated, record.device)
        self._begin(connection)
        say(adopted=record.share, minor=record.minor, resend=connection.resend())

    def _begin(self, connection: Connection) -> None:
        share = connection.spec.share
        notifier = self._notifiers.attach(connection)
        self._promises[share] = Promises(Announced(notifier))
        self._shares[share] = MemoryFilesystem(connection, self._hold, self._valid), notifier
        self._nursery.start_soon(self._serve, share)

    async def _serve(self, share: int) -> None:
        filesystem, notifier = self._shares[share]
        await filesystem.connection.serve(filesystem.handle)
        del self._shares[share]
        self._notifiers.detach(notifier)
        filesystem.connection.close()
        fdstore.remove(filesystem.connection.stored_as().name())
        say(ended=share)

    async def obey(self) -> None:
        stdin = trio.lowlevel.FdStream(os.dup(0))
        pending = b""
        while data := await stdin.receive_some():
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                order, *words = line.decode().split(" ")
                await getattr(self, "do_" + order)(*words)

    async def do_mount(self, share: str, path: str) -> None:
        self._nursery.start_soon(self.mount, MountSpec(int(share), path))

    async def do_unmount(self, share: str) -> None:
        connection = self._shares[int(share)][0].connection
        await trio.to_thread.run_sync(connection.unmount)

    async def do_abort(self, share: str) -> None:
        connection = self._shares[int(share)][0].connection
        await trio.to_thread.run_sync(connection.abort)

    async def do_state(self, share: str) -> None:
        filesystem, _ = self._shares[int(share)]
        negotiated = filesystem.connection.negotiated
        assert negotiated is not None
        say(
            counts=filesystem.counts,
            largest=filesystem.largest,
            resent=filesystem.resent,
            negotiated=[negotiated.minor, negotiated.flags],
        )

    async def do_leaks(self) -> None:
        names = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                names.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:
                continue  # the one that listed them
        say(devices=names.count("/dev/fuse"), fds=len(names), threads=threading.active_count())

    async def do_set(self, share: str, node: str, text: str) -> None:
        self._shares[int(share)][0].nodes[int(node)].data[:] = text.encode() + b"\n"
        say(set=text)

    async def do_invalidate(self, share: str, node: str) -> None:
        self._shares[int(share)][1].invalidate_data(int(node), lambda: say(invalidated=int(node)))

    async def do_add(self, share: str, parent: str, name: str) -> None:
        """As somebody on the host."""
        number = self._shares[int(share)][0]._add(int(parent), name.encode(), stat.S_IFREG | 0o644)
        say(added=number)

    async def do_take_back(self, share: str, changed: str) -> None:
        self._promises[int(share)].take_back(eval(changed, {"Changed": Changed}))

    async def do_renamed(self, share: str, parent: str, name: str, new_name: str) -> None:
        old, new = (int(parent), name.encode()), (int(parent), new_name.encode())
        self._promises[int(share)].renamed(old, new, 0, expire=True)

    async def do_purge(self, share: str) -> None:
        await trio.to_thread.run_sync(mounting.purge, self._shares[int(share)][0].connection.spec.path)
        say(purged=True)

    async def do_release(self, share: str) -> None:
        filesystem = self._shares[int(share)][0]
        # A READ whose page was dropped before its caller saw it is sent again by the kernel.
        filesystem.hold = False
        while filesystem.held:
            filesystem.held.pop(0)()
        say(released=True)


def spec_of(argument: str) -> MountSpec:
    share, path, *options = argument.split(":")
    return MountSpec(int(share), path, read_only="ro" in options, host_locks="locks" in options)


async def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    async with trio.open_nursery() as nursery:
        notifiers = Notifiers()
        await nursery.start(notifiers.run)
        valid = NAME | ATTRIBUTES if "--promise" in arguments else 0
        server = Server(nursery, notifiers, "--hold" in arguments, valid)
        if arguments[0] == "adopt":
            for stored in fdstore.take():
                server.adopt(stored)
        else:
            for spec in mounting.outermost_first(map(spec_of, (a for a in arguments[1:] if ":" in a))):
                await server.mount(spec)
        say(ready=True)
        await server.obey()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
