"""What a guest is told when something has changed on the host: from what was seen there to ``Changed``.

The laws:
- More may be told than was ever promised, never less. What the guest looks up by a name is told by that name too, since
  it may have none of the numbers yet: its kernel may be about to learn of them from an answer that went before.
- Of a file that is told of the guest has no data: there is no alarm to be raised any more (``signatures``).
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from fileserver.fanotify import OPEN
from fileserver.nodes import Link, Node
from fileserver.signatures import acknowledged
from fileserver.watches import Changes
from protocol.files import Changed

AT_ONCE: Final = 512
"""Of each kind in one notice: names have up to 255 bytes, and a header 256 KiB."""


class Name(NamedTuple):
    """A name that may stand for something else now. ``node``: for what, as far as the guest was told."""

    directory: int
    name: bytes
    node: Node | None


@dataclass(slots=True)
class Retraction:
    """Of one share. ``nodes`` and ``directories`` each with a directory that has it (0: none is known). ``attributes``:
    of these the guest's agent may have old ones; its kernel and its data are right."""

    names: list[Name] = field(default_factory=list)
    nodes: list[tuple[Node, int]] = field(default_factory=list)
    directories: list[tuple[int, int]] = field(default_factory=list)
    attributes: list[int] = field(default_factory=list)

    def file(self, node: Node, directory: int) -> None:
        """Attributes and data of a file."""
        self.nodes.append((node, directory))

    def directory(self, node: Node, above: int) -> None:
        """Attributes of a directory, and the list of its names."""
        self.directories.append((node.number, above))

    @property
    def weight(self) -> int:
        return len(self.names) + len(self.nodes) + len(self.directories) + len(self.attributes)

    def notices(self, share: int) -> list[Changed]:
        """The same, which must be sent, one after another. In trio's thread."""
        for node, _ in self.nodes:
            acknowledged(node)
        longest = max(len(self.names), len(self.nodes), len(self.directories), len(self.attributes))
        return [self._notice(share, slice(at, at + AT_ONCE)) for at in range(0, longest, AT_ONCE)]

    def _notice(self, share: int, part: slice) -> Changed:
        names, nodes, directories = self.names[part], self.nodes[part], self.directories[part]
        return Changed(
            share,
            parents=[name.directory for name in names],
            names=[name.name for name in names],
            fresh=[name.node is None for name in names],
            nodes=[node.number for node, _ in nodes],
            through=[directory for _, directory in nodes],
            directories=[directory for directory, _ in directories],
            above=[above for _, above in directories],
            attributes_only=self.attributes[part],
        )


class Retractions:
    """Those of one share, in trio's thread."""

    def __init__(self, by_name: Mapping[Link, Node]) -> None:
        """``by_name``: the table of the share, of which single entries are looked at without its lock."""
        self._by_name = by_name

    def of(self, changes: Changes) -> Retraction:
        told = Retraction()
        for directory, names in changes.names.items():
            told.directory(directory, above(directory))
            for name in names:
                self._name(told, directory.number, name)
        for directory in changes.selves - changes.names.keys():
            told.directory(directory, above(directory))
        for file, mask in changes.files.items():
            if mask & ~OPEN:
                told.file(file, above(file))
        return told

    def again(self, told: Retraction) -> Retraction:
        """What of it must be said once more if it may not have arrived. A name need not be if it still stands for what
        it did as far as the guest was told since; that there was nothing it does not remember in another session."""
        names = [
            name
            for name in told.names
            if name.node is not None and self._by_name.get((name.directory, name.name)) is not name.node
        ]
        return Retraction(names, told.nodes, told.directories, told.attributes)

    def _name(self, told: Retraction, directory: int, name: bytes) -> None:
        """A file that has lost a name, or got one, has another ctime at least."""
        node = self._by_name.get((directory, name))
        told.names.append(Name(directory, name, node))
        if node is None:
            return
        if node.kind == stat.S_IFDIR:
            told.directory(node, directory)
        else:
            told.file(node, directory)


def above(node: Node) -> int:
    """A directory that has the node; 0 if none is known."""
    return node.links[-1][0] if node.links else 0
