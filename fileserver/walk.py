"""The way back to a file: by its names, from a directory that is held.

The laws:
- A file whose descriptor was closed is found again by walking its names down from the nearest directory that is
  held, one component at a time, no symlink followed. What is then found must be the same file
  (``Identity``), else the answer is ESTALE: never another file's content.
- A walk begins in a directory that is in the share (``confinement``), and no call gets another one to look at names in.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable
from typing import Final

from fileserver import linux
from fileserver.confinement import confirm, is_below
from fileserver.devices import Devices
from fileserver.linux import failure
from fileserver.nodes import Node
from fileserver.registry import Registry, close_all

MAX_DEPTH: Final = 4096
"""Directories below each other: a path has 4,096 bytes. Also ends a walk in a circle, which directories that were
moved into each other on the host may seem to be."""

WALKS: Final = 5
"""Attempts to find a file: the guest may rename a directory above it between a look at the table and one at the
disk. What is being renamed is held, so only a walk that began before meets that, and not often twice. The same goes for
what the host renames, if that is the root."""

_UNREACHABLE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class Walk:
    """Those of one share. Nodes are returned with one use more."""

    def __init__(self, registry: Registry, devices: Devices) -> None:
        self._registry = registry
        self._devices = devices
        self._root = registry.table.root
        self._root.confirmed = math.inf
        # On the way of every call:
        self._lock, self._nodes, self._use = registry.lock, registry.table.by_number, registry.held.use

    def acquire(self, number: int) -> Node:
        """The file, its descriptor open until it is released. Raises ESTALE, or what the walk to it met."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or node.dead:
                raise failure(errno.ESTALE)
            if node.descriptor >= 0:
                self._use(node)
                return node
        self._find(node, self._by_its_names)
        return node

    def acquire_directory(self, number: int) -> Node:
        """As ``acquire``, for names to be looked at in it: it is below the root, or was a moment ago."""
        with self._lock:
            node = self._nodes.get(number)
            if node is None or node.dead:
                raise failure(errno.ESTALE)
            if node.descriptor >= 0 and time.monotonic() < node.confirmed:
                self._use(node)
                return node
        self._find(node, self._below_the_root)
        return node

    def open_entry(self, directory: Node, name: bytes) -> int:
        """The entry itself, by an O_PATH descriptor. Makes room if there are too many."""
        return self._registry.opening(lambda: linux.open_entry(directory.descriptor, name))

    # --- attempts ----------------------------------------------------------------------------------

    def _find(self, node: Node, attempt: Callable[[Node], bool]) -> None:
        registry = self._registry
        for _ in range(WALKS):
            if self._root.descriptor < 0:
                raise failure(registry.root_errno)
            if attempt(node):
                return
        if not node.lost and not node.dead:
            node.lost = True
            registry.lost += 1
        raise failure(errno.ESTALE)

    def _by_its_names(self, node: Node) -> bool:
        """Try them, the newest first."""
        for parent, name in reversed(node.links):
            try:
                directory = self._find_directory(parent)
                try:
                    self._open_again(directory, name, node)
                finally:
                    self._registry.release(directory)
            except OSError as error:
                if error.errno not in _UNREACHABLE:
                    raise
                continue
            return True
        return False

    def _below_the_root(self, directory: Node) -> bool:
        try:
            self._find_directory(directory.number)
        except OSError as error:
            if error.errno not in _UNREACHABLE:
                raise
            return False
        return True

    # --- the walk ----------------------------------------------------------------------------------

    def _find_directory(self, number: int) -> Node:
        """Up to the first directory that is held, and in the share, and down again."""
        registry = self._registry
        below: list[tuple[bytes, Node]] = []
        while True:
            with self._lock:
                node = self._nodes.get(number)
                if node is None or node.dead:
                    raise failure(errno.ESTALE)
                held = node.descriptor >= 0
                if held:
                    self._use(node)
            if held:
                if self._is_in_the_share(node):
                    break
                registry.release(node)
            if not node.links or len(below) > MAX_DEPTH:
                raise failure(errno.ESTALE)
            number, name = node.links[-1]
            below.append((name, node))
        while below:
            name, child = below.pop()
            try:
                self._open_again(node, name, child)
            finally:
                registry.release(node)
            node = child
        return node

    def _is_in_the_share(self, directory: Node) -> bool:
        """Of one that is in use. If not, it stays held, since it may come back; but here it must be found anew."""
        if time.monotonic() < directory.confirmed:
            return True
        with self._lock:
            if self._root.descriptor < 0:
                return False
            self._use(self._root)
        try:
            below = is_below(directory, self._root)
        finally:
            self._registry.release(self._root)
        if below:
            confirm(directory)
        return below

    def _open_again(self, directory: Node, name: bytes, node: Node) -> None:
        """``node``, by its name in ``directory``, which is in the share."""
        if directory.sealed:
            raise failure(errno.EACCES)
        descriptor = self.open_entry(directory, name)
        try:
            status = linux.fstatx(descriptor)
            if self._devices.key(status, descriptor) != node.key:
                raise failure(errno.ESTALE)
        except BaseException:
            os.close(descriptor)
            raise
        with self._lock:
            node.kind = status.kind
            closing = self._registry.held.replace(node, descriptor)
            dead = node.dead
        close_all(closing)
        if dead:
            raise failure(errno.ESTALE)
        confirm(node)
