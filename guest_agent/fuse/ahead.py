"""Which directories to list before anybody asks for a listing. Sans-IO.

``Ahead``: a guest that looks into one directory after the other below the same one (find, git status, a compiler that
searches for headers), or lists one and then one of its own, is likely to go on. Then those that follow are listed
ahead: first the ones below where the guest is, then those beside it, beside the one above it and so on, at last what is
below those that were listed ahead. How many of each is adaptive: twice as many each time that the guest comes to one of
them, half as many when it goes where nobody expected it. So a guest that looks at one directory here and one there
costs next to nothing. "Follow" is in the order of the listing, as find(1) goes, or of names, as git(1) does: of the
two, that in which the guest has gone from one to the next.

``Interest``: whoever looks up several names of one directory (git status has them in its index, and lists nothing)
is likely to want all of them, and one listing costs the host some us a name, the link less than two lookups.

What is remembered is bounded by ``MAX_KNOWN`` and ``MAX_COUNTED``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, islice
from typing import Final

MAX_UNDER_WAY: Final = 4
"""Listings that are asked for ahead at once. The host has 6 threads for a share, which others need as well..."""
MOST_UNDER_WAY: Final = 64
"""...but of a host that is far away most of them are on their way."""

FEWEST: Final = 1
MOST: Final = 64
"""Directories below the same one that are listed ahead of the guest..."""
MOST_IN_ALL: Final = 256
"""...and all of them. Of more, the first are given up: the guest did not come."""

NEAR: Final = 4
"""How far apart, in an order, are directories that the guest comes to one after the other at the most (those between
them it may not need, or has been to)."""
WALKING: Final = 3
"""Directories below the same one to which the guest has come, and is likely to want all names of the next one, too."""

MOST_NAMED: Final = 4096
"""Directories below the same one up to which they are sorted by name for a walk whose order is not known: 5 ms."""

MAX_KNOWN: Final = 65_536
"""Directories of which it is known which one they are in. 200 bytes each."""

MAX_COUNTED: Final = 4096
"""Directories in which lookups are counted."""
FEW: Final = 3
SHARE: Final = 16
"""So many lookups make a directory worth to be listed, or one in so many of the names in a piece of it..."""
MOST_NEEDED: Final = 65_536
"""...and twice as many each time that this turns out not to have helped, up to so many."""


class _Family:
    """The directories that are in one of them."""

    __slots__ = ("_left", "_next", "ahead", "children", "listed", "named", "visited")

    def __init__(self, children: list[int], listed: list[int], before: _Family | None) -> None:
        """``before``: what was known of it, without those that are in it no more."""
        self.children, self.listed = children, listed
        """In the order in which the guest goes, and in that in which they came."""
        self.named: list[int] = []
        """In the order of their names, once somebody wants to know."""
        self.visited: int = 0 if before is None else before.visited
        """How many of them the guest has been to."""
        self.ahead: int = 0 if before is None else before.ahead
        """How many were asked for, where it has not been yet."""
        self._next = 0
        self._left = len(children)

    def go_on_after(self, index: int) -> None:
        """It has come there unexpectedly, perhaps one of several that walk at once."""
        self._next = (index + 1) % len(self.children)
        self._left = len(self.children)

    def extend(self, children: list[int], listed: list[int]) -> None:
        if self.listed is not self.children:
            self.listed += listed
        self.children += children
        self.named = []
        self._left += len(children)

    def take(self) -> int | None:
        """Each once, round and round from where the guest began."""
        if not self._left:
            return None
        child = self.children[self._next]
        self._next = (self._next + 1) % len(self.children)
        self._left -= 1
        return child


class Ahead:
    def __init__(
        self,
        by_name: Callable[[Sequence[int]], list[int]],
        scaled: Callable[[int, int], int] = lambda count, most: count,
    ) -> None:
        """``by_name`` sorts directories that are in the same one. ``scaled``: how many to ask for, where that is the
        first number of a host that is near, and at most the second (``Distance.scaled``)."""
        self._sorted = by_name
        self._scaled = scaled
        self._by_name = False
        """Whether that is how the guest goes."""
        self._families: OrderedDict[int, _Family] = OrderedDict()
        self._places: dict[int, tuple[int, int]] = {}
        """Of each directory in a family, whose it is, and where in it."""
        self._done: set[int] = set()
        """Those of them that the guest has been to, or that were asked for."""
        self._ahead: OrderedDict[int, None] = OrderedDict()
        """Those that were asked for, where the guest has not been yet."""
        self._under_way: set[int] = set()
        self._room = 2
        self._focus = 0
        """Where the guest is, if it is walking."""
        self._only_below = False
        """It is not known to be, and what is beside it not worth to be listed."""
        self._last = self._last_read = 0

    def visited(self, node: int, *, reading: bool) -> bool:
        """The guest looks up a name in this directory, or begins to read it: whether there may be a ``next``."""
        before, self._last = self._last, node
        before_read = self._last_read
        if reading:
            self._last_read = node
        if node == before or node not in self._places:
            return False
        if node in self._ahead:
            self._come(node)
            self._room = min(2 * self._room, MOST)
            self._family_of(node).visited += 1
            self._walk_to(node)
            return True
        return node not in self._done and self._is_walking(node, before_read)

    def _is_walking(self, node: int, read: int) -> bool:
        """It has come to one that nobody foresaw. ``read``: the one that it has begun to read last."""
        above, index = self._places[node]
        family = self._families[above]
        self._done.add(node)
        family.visited += 1
        if family.visited == 1:
            family.go_on_after(index)
            if above != read:
                return False
        elif self._follows_another(family.children, index):
            if family.ahead >= self._scaled(
                self._room, MOST
            ):  # one of several walkers, for whom there was none left
                self._room = min(2 * self._room, MOST)
            family.go_on_after(index)
        elif self._is_in_another_order(above, family, node):
            family.go_on_after(self._places[node][1])
        elif family.ahead:
            self._room = max(self._room // 2, FEWEST)
        self._walk_to(node)
        return True

    def _walk_to(self, node: int) -> None:
        self._focus, self._only_below = node, False

    def look_below(self, node: int) -> None:
        """The guest may be about to go below this one: to be listed ahead before it is known to, if that is cheaper
        than to wait for it."""
        self._focus, self._only_below = node, True

    def following(self, node: int) -> list[int]:
        """Those beside this one, from it on round to it, as many as may be listed ahead; whether they were or not."""
        if (place := self._places.get(node)) is None:
            return []
        children, index = self._families[place[0]].children, place[1]
        return [*children[index + 1 :], *children[:index]][: self._scaled(self._room, MOST)]

    def below(self, node: int, most: int) -> Iterator[int]:
        """Where somebody may go next, whoever listed it before: the first ``most`` below this one in the order of
        names, and as many in that of the listing, by turns."""
        if (family := self._families.get(node)) is not None:
            yield from _by_turns([islice(order, most) for order in self._orders(family)])

    def beside(self, node: int, most: int) -> Iterator[int]:
        """The same of those after this one, round and round."""
        if (place := self._places.get(node)) is not None:
            orders = self._orders(self._families[place[0]])
            starts = [order.index(node) + 1 for order in orders]
            yield from _by_turns(
                [
                    islice(chain(islice(order, start, None), islice(order, start - 1)), most)
                    for order, start in zip(orders, starts, strict=True)
                ]
            )

    def _orders(self, family: _Family) -> list[list[int]]:
        if len(family.listed) > MOST_NAMED:
            return [family.children]
        if not family.named:
            family.named = self._sorted(family.listed)
        return [family.named, family.listed]

    def _follows_another(self, children: list[int], index: int) -> bool:
        """Whether the guest has been to one of those right before this one."""
        done, ahead = self._done, self._ahead
        return any(child in done and child not in ahead for child in children[max(index - NEAR, 0) : index])

    def _is_in_another_order(self, above: int, family: _Family, node: int) -> bool:
        """Whether ``node`` follows another in the order that is not expected. Then it is from now on."""
        other = family.listed if self._by_name else self._sorted(family.listed)
        if not self._follows_another(other, other.index(node)):
            return False
        self._by_name = not self._by_name
        family.children = other
        for child in [child for child in self._ahead if self._places.get(child, (0, 0))[0] == above]:
            self._come(child)
        for place, child in enumerate(other):
            self._places[child] = above, place
        return True

    def is_walking(self, node: int) -> bool:
        """Whether the guest, which looks up a name in ``node``, is likely to want others as well."""
        return node in self._places and self._family_of(node).visited >= WALKING

    def listed(self, node: int, directories: list[int], *, first: bool) -> None:
        """A piece of a listing of ``node``, the ``first`` or another, has these directories."""
        self._under_way.discard(node)
        family = self._families.get(node)
        if first and family is not None:
            self._forget(node, keep=set(directories))
        children = self._sorted(directories) if self._by_name else directories
        if first or family is None:
            start, family = 0, _Family(children, directories, family)
            self._families[node] = family
        else:
            start = len(family.children)
            family.extend(children, directories)
        for index, child in enumerate(children, start):
            if self._places.get(child, (node, 0))[0] != node:
                self._come(child)  # it was moved
            self._places[child] = node, index
        while len(self._places) > MAX_KNOWN and len(self._families) > 1:
            self._forget(next(iter(self._families)))

    def failed(self, node: int) -> None:
        """It was asked for, and has not come, or is not promised."""
        self._under_way.discard(node)
        self._come(node)

    def next(self) -> int | None:
        """The directory to ask for now, if any: ``listed`` or ``failed`` is to follow."""
        if not self._focus or len(self._under_way) >= self._scaled(MAX_UNDER_WAY, MOST_UNDER_WAY):
            return None
        room = self._scaled(self._room, MOST)
        for family in self._near(room):
            while family.ahead < room and (child := family.take()) is not None:
                if child not in self._done and child not in self._under_way and self._has(family, child):
                    self._go_to(child, family)
                    return child
            room = self._room  # only next to the guest it pays to be as much ahead as the host is far away
        return None

    def _near(self, room: int) -> Iterator[_Family]:
        """In the order in which they are likely to be needed."""
        node = self._focus
        passed: set[int] = set()
        while node not in passed:  # of two that were moved each may be known as below the other
            passed.add(node)
            if (family := self._families.get(node)) is not None:
                yield family
            if self._only_below or (place := self._places.get(node)) is None:
                break
            node = place[0]
        if len(self._ahead) < room:
            for node in self._ahead:
                if (family := self._families.get(node)) is not None:
                    yield family

    def _has(self, family: _Family, child: int) -> bool:
        """Whether it still does. One that was moved is another's by now, or nobody's."""
        return child in self._places and self._family_of(child) is family

    def _go_to(self, node: int, family: _Family) -> None:
        self._done.add(node)
        self._ahead[node] = None
        family.ahead += 1
        self._under_way.add(node)
        if len(self._ahead) > MOST_IN_ALL:
            self._come(next(iter(self._ahead)))

    def _come(self, node: int) -> None:
        """It is not ahead any more."""
        if node in self._ahead:
            del self._ahead[node]
            if node in self._places:  # or it went with its family, while it was asked for
                self._family_of(node).ahead -= 1

    def _family_of(self, node: int) -> _Family:
        return self._families[self._places[node][0]]

    def _forget(self, node: int, keep: Collection[int] = ()) -> None:
        for child in self._families[node].children:
            if child not in keep and self._places.get(child, (0, 0))[0] == node:
                self._come(child)
                self._done.discard(child)
                del self._places[child]
        del self._families[node]


def _by_turns(orders: Sequence[Iterator[int]]) -> Iterator[int]:
    return chain.from_iterable(zip(*orders, strict=True))


class Interest:
    """Which directories are worth to be listed because names of them are looked up."""

    def __init__(self) -> None:
        self._counts: OrderedDict[int, list[int]] = OrderedDict()
        """Lookups since it was listed, and how many it takes."""
        self._first: int = 0
        """The directory that was ``asked`` for the first time just now."""

    def asked(self, node: int) -> bool:
        """The host had to be asked for a name of this directory: whether the directory is to be listed now."""
        counts = self._counts.get(node)
        self._first = 0
        if counts is None:
            self._first = node
            counts = self._counts[node] = [0, FEW]
            if len(self._counts) > MAX_COUNTED:
                self._counts.popitem(last=False)
        counts[0] += 1
        if counts[0] < counts[1]:
            return False
        counts[0] = 0
        return True

    def begin(self, node: int) -> None:
        """Its names have come, without what lookups ask for."""
        if (counts := self._counts.get(node)) is not None:
            counts[0] = 0

    def is_new(self, node: int) -> bool:
        """Whether it was ``asked`` for the first time, or for the first time since it was listed."""
        return node in self._counts and self._counts[node][0] == 1

    def is_first(self, node: int) -> bool:
        """Whether it was ``asked`` for the first time ever, just now."""
        return node == self._first

    def listed(self, node: int, count: int, *, helps: bool) -> None:
        """A piece with ``count`` names has come. ``helps``: with names that were not here before."""
        if (counts := self._counts.get(node)) is not None:
            least = FEW if helps else min(2 * counts[1], MOST_NEEDED)
            counts[0], counts[1] = 0, max(count // SHARE, least)
