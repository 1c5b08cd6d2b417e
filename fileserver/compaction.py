"""A journal without what is dead in it, read out of the journal itself. Sans-IO: entries in, entries out.

The law: what this needs in memory is a number for each node that the guest knows, 110 bytes, and a record only for
those that have lost a name. A ledger of all of them takes 700 bytes each, and a guest that has walked a million files
would have this process grow by that for some seconds.

So the entries are read several times: for what is alive at their end; if directories were forgotten, for those that
living nodes are found by; and to be passed on. The order of nodes is kept, and their last counts follow their first
names, so that every prefix of what comes out is as safe as one of what went in (``ledger``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from fileserver.ledger import Entry, Kind, Ledger, node_entries

logger = logging.getLogger(__name__)

Read = Callable[[], Iterator[Entry]]
"""The entries, from the first one on, each time."""

_ROOT: Final = 1
"""It need not have an entry."""

NOT_YET_COUNTED: Final = 4096
"""Entries at the end among which a name may still wait for its count, which is written after it: not dead, but new."""

Nodes = dict[int, dict[int, int]]
"""Of a share, its nodes, with their lookups."""


def survivors(read: Read, last_node: int, last_handle: int) -> Iterator[Entry]:
    """The shortest journal that says the same, up to the first entry that is damaged. The numbers are the last that
    were given out."""
    survey = _Survey()
    survey.take(read())
    survey.rest.last_node, survey.rest.last_handle = last_node, last_handle
    yield from survey.rest.entries()
    while survey.lacks_directories:
        survey.find_directories(islice(read(), survey.count))
    yield from survey.nodes(islice(read(), survey.count))


class _Survey:
    """What is alive."""

    def __init__(self) -> None:
        self.rest = Ledger()
        """All that is not about nodes."""
        self.count = 0
        """Of entries that are sound."""
        self._kept: Nodes = {}
        self._since: dict[int, int] = {}
        """The place of the entry behind which a share's nodes count: it was dropped there."""
        self._renamed: dict[int, set[int]] = {}
        """Nodes that have lost a name, or that were forgotten once: of these all entries are gone through."""
        self._parents: dict[int, set[int]] = {}
        self.lacks_directories = False
        """A directory may be needed that is not kept."""

    def take(self, entries: Iterator[Entry]) -> None:
        new: dict[tuple[int, int], int] = {}
        try:
            for entry in entries:
                self._take(entry, new)
                self.count += 1
        except (TypeError, ValueError, IndexError) as error:
            logger.warning("the journal is damaged, and used up to there: %s", error)
        for (share, node), place in new.items():
            if place < self.count - NOT_YET_COUNTED:
                self._drop(share, node)

    def _take(self, entry: Entry, new: dict[tuple[int, int], int]) -> None:
        kind = entry[0]
        if kind == Kind.NODE:
            _, share, node, parent, _name, _device, _inode, _birth = entry
            nodes = self._kept.setdefault(share, {})
            if node not in nodes:
                nodes[node] = 0
                new[share, node] = self.count
            self._parents.setdefault(share, set()).add(parent)
            self.lacks_directories |= parent > _ROOT and parent not in nodes
        elif kind == Kind.COUNTED:
            _, share, node, lookups = entry
            nodes = self._kept.setdefault(share, {})
            if node in nodes:
                new.pop((share, node), None)
                if lookups > 0:
                    nodes[node] = lookups
                else:
                    self._drop(share, node)
            elif lookups > 0:
                # It was forgotten, and is known again by the names that it had.
                nodes[node] = lookups
                self._renamed.setdefault(share, set()).add(node)
                self.lacks_directories = True
        elif kind == Kind.UNLINKED:
            _, share, node, _parent, _name = entry
            if node in self._kept.get(share, ()):
                self._renamed.setdefault(share, set()).add(node)
        else:
            self.rest.apply(entry)
            if kind == Kind.DROPPED:
                for table in (self._kept, self._renamed, self._parents):
                    table.pop(entry[1], None)
                for key in [key for key in new if key[0] == entry[1]]:
                    del new[key]
                self._since[entry[1]] = self.count

    def _drop(self, share: int, node: int) -> None:
        del self._kept[share][node]
        self._renamed.get(share, set()).discard(node)
        self.lacks_directories |= node in self._parents.get(share, ())

    def find_directories(self, entries: Iterator[Entry]) -> None:
        """Keep what nodes that are kept are in. Entries of a directory that is found so may have been passed over."""
        self.lacks_directories = False
        for share, nodes, entry in self._of_nodes(entries):
            if entry[2] not in nodes:
                continue
            if entry[0] == Kind.UNLINKED:
                self._renamed.setdefault(share, set()).add(entry[2])
            elif entry[0] == Kind.NODE and entry[3] not in nodes and entry[4]:
                nodes[entry[3]] = 0
                self.lacks_directories = True

    def nodes(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """The entries of those that are kept. (Once: it is used up.)"""
        renamed = Ledger()
        for share, nodes, entry in self._of_nodes(entries):
            node = entry[2]
            if node not in nodes:
                continue
            if node in self._renamed.get(share, ()):
                renamed.apply(entry)
            elif entry[0] == Kind.NODE:
                yield entry
                if lookups := nodes[node]:
                    nodes[node] = 0
                    yield [Kind.COUNTED, share, node, lookups]
        for share, records in renamed.nodes.items():
            yield from node_entries(share, records)

    def _of_nodes(self, entries: Iterator[Entry]) -> Iterator[tuple[int, dict[int, int], Entry]]:
        """Those that are about nodes of shares as they are now."""
        for place, entry in enumerate(entries):
            if entry[0] in (Kind.NODE, Kind.UNLINKED, Kind.COUNTED):
                share = entry[1]
                nodes = self._kept.get(share)
                if nodes and place > self._since.get(share, -1):
                    yield share, nodes, entry
