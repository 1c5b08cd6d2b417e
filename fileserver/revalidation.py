"""Looking at everything again, when what was promised may not hold and nobody told: events were lost, the machine
slept, filesystems were mounted or unmounted, or the session with the guest is another one.

The laws:
- What is told is what differs from what the guest was last promised (``Node.given``), and what cannot be compared.
- It is watched again before it is looked at, so what happens meanwhile is told in the usual way.
- A name is told only if it stands for another file: the guest's kernel unmounts what a container has mounted there.

A file takes 4 us, a name in a directory 1 us.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from fileserver import linux
from fileserver.core import Core
from fileserver.nodes import Node
from fileserver.promises import fingerprint
from fileserver.retractions import AT_ONCE, Name, Retraction, above
from protocol.files import ROOT

_Children = dict[bytes, Node]
_NOTHING: Final[_Children] = {}


class Revalidation:
    """Of one share."""

    def __init__(self, core: Core, tell: Callable[[Retraction], None]) -> None:
        """``tell`` is called with what differs, a part at a time."""
        self._core = core
        self._reach = core.reach
        self._tell = tell
        self._told = Retraction()

    def run(self, *, absences: bool, trusting: bool) -> None:
        """``absences``: the guest may also have been promised that there are no files of names that are there now.
        ``trusting``: this process knows what the guest was last promised; else it is told of every file. What it has
        names for is known in any case."""
        self._absences, self._trusting = absences, trusting
        children: defaultdict[int, _Children] = defaultdict(dict)
        nodes, names = self._reach.everything()
        for (directory, name), node in names:
            children[directory][name] = node
        for node in nodes:
            if node.kind in (0, stat.S_IFDIR) and not node.dead:
                self._directory(node, children.pop(node.number, _NOTHING))
        for node in nodes:
            if not node.links and node.number != ROOT:
                self._unnamed(node)
        self._flush(0)

    def _directory(self, directory: Node, children: _Children) -> None:
        try:
            with self._reach.use_directory(directory.number):
                if directory.kind == stat.S_IFDIR and not directory.sealed:
                    self._look_into(directory, children)
        except OSError:  # gone: it is told by its own name
            return
        self._flush(AT_ONCE)

    def _look_into(self, directory: Node, children: _Children) -> None:
        self._core.promises.look_into(directory)
        if self._differs(directory, linux.fstatx(directory.descriptor)):
            self._told.directory(directory, above(directory))
            if self._absences:
                there = self._names(directory)
                self._told.names += [
                    Name(directory.number, name, None) for name in there if name not in children
                ]
        for name, node in children.items():
            self._name(directory, name, node)

    def _names(self, directory: Node) -> list[bytes]:
        flags = os.O_RDONLY | os.O_DIRECTORY
        descriptor = self._reach.opening(lambda: linux.reopen(directory.descriptor, flags))
        try:
            return [entry.name for entry in linux.read_directory(descriptor)]
        finally:
            os.close(descriptor)

    def _name(self, directory: Node, name: bytes, node: Node) -> None:
        """What the guest knows as ``name`` in ``directory``."""
        try:
            if node.given and not self._core.promises.is_watched(node):
                with self._reach.use(node.number):
                    self._core.promises.look_at(node)
            status = linux.statx(directory.descriptor, name)
            is_same = self._reach.devices.is_key(node.key, status)
            differs = self._differs(node, status)
        except OSError:
            is_same, differs = False, True
        if is_same:
            node.kind = status.kind
        is_file = node.kind != stat.S_IFDIR
        if not is_same:
            self._told.names.append(Name(directory.number, name, node))
        if is_file and (not is_same or differs):
            self._told.file(node, directory.number)

    def _unnamed(self, node: Node) -> None:
        """A file that the guest has open, without a name: nobody can tell of it but its own mark."""
        try:
            with self._reach.use(node.number):
                self._core.promises.look_at(node)
                differs = self._differs(node, linux.fstatx(node.descriptor))
        except OSError:
            return
        if differs:
            self._told.file(node, 0)

    def _differs(self, node: Node, status: linux.Status) -> bool:
        """Of a directory without a promise the names may have been promised; of a file that is all there is."""
        if not self._trusting or (not node.given and node.kind == stat.S_IFDIR):
            return True
        return node.given != 0 and node.given != fingerprint(self._core.attr(status))

    def _flush(self, below: int) -> None:
        if self._told.weight > below:
            self._tell(self._told)
            self._told = Retraction()
