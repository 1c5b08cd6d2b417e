"""Is what somebody saw of a file older than it may be? The judge of the coherence stress, who knows everything afterwards.

Many processes change and look at *slots*, names that may be a file, a directory, a symlink, or nothing. Each change was
made by one of them at a time (they lock a slot for it), who then wrote down the state of it, looking past all caches.
Times are of one clock, in ns.

The laws, ``grace`` apart, within which a change need not be seen yet:
- A look that begins after a change has ended sees that state or a later one (``LAW_TIME``).
- After one look has seen a state, none that begins later sees an older one (``LAW_ORDER``), of whichever process.
- After a look has seen the sentinel of a directory in a state, none that begins later sees what was in that directory
  in a state that was over before the sentinel came into that state (``LAW_SENTINEL``).

Of the directories themselves, which many change at once, only the time stamps are judged, which never go back.

Each field of a look is judged by itself, since two system calls never see one moment. A value that fits no state of the
slot at all is wrong (``LAW_TRUTH``), unless the slot has changed within the grace: a write(2) passes through others, and
who has found a file by its name sees it also where it is moved meanwhile, or gone, as on any filesystem.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

LAW_TIME: Final = "a change was not seen"
LAW_ORDER: Final = "what had been seen was unseen"
LAW_SENTINEL: Final = "an older change was not seen with a younger one"
LAW_TRUTH: Final = "what was seen never was"

SENTINEL: Final = "an older change was not seen with a younger one"
LAW_TRUTH: Final = "what was seen never was"

PASSING: Final = frozenset({"size", "length", "mtime", "ctime", "version", "nlink"})
"""What a write(2) may show while it goes on, as neither before nor after it; and of a file whose name goes between the
two halves of a stat(2), nlink."""

SENTINEL: Final = "sentinel"
"""The last component of a sentinel's name."""

State = dict[str, Any]
"""``what`` it is (an errno's name if nothing), and the fields that a look may have. ``version`` is a list, of all that its content shows."""


@dataclass(frozen=True, slots=True)
class Changed:
    """From ``begin`` to ``end`` somebody brought ``slot`` into ``state``."""

    slot: str
    begin: int
    end: int
    state: State


@dataclass(frozen=True, slots=True)
class Looked:
    """From ``begin`` to ``end`` somebody saw ``fields`` of ``slot``."""

    slot: str
    begin: int
    end: int
    fields: State


@dataclass(frozen=True, slots=True)
class Stale:
    """A look that breaks a law. ``age``: ns since the state that it should have shown at least."""

    law: str
    look: Looked
    name: str
    value: Any
    least: State
    age: int

    def __str__(self) -> str:
        return (
            f"{self.law}: {self.look.slot} {self.name} was {self.value!r} {self.age / 1e6:.1f} ms after it was "
            f"{self.least.get(self.name)!r} ({self.look.fields})"
        )


@dataclass(slots=True)
class _Slot:
    """``states[i]`` came about from ``begins[i]`` to ``ends[i]``. ``indices[name][value]``: which states have that value."""

    states: list[State] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    indices: dict[str, dict[Any, list[int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def add(self, change: Changed) -> None:
        index = len(self.states)
        self.states.append(change.state)
        self.begins.append(change.begin)
        self.ends.append(change.end)
        for name, value in _values({**change.state, "listed": change.state["what"] != "ENOENT"}):
            self.indices[name][value].append(index)
        if "size" in change.state:
            self.indices["length"][change.state["size"]].append(index)

    def fits(self, name: str, value: Any, first: int, last: int) -> bool:
        """Whether one of the states from ``first`` to ``last`` has it."""
        found = self.indices[name].get(value, [])
        at = bisect_right(found, last)
        return at > 0 and found[at - 1] >= first

    def earliest(self, name: str, value: Any, first: int, last: int) -> int:
        """The first of them that has it, or -1."""
        return next((index for index in self.indices[name].get(value, []) if first <= index <= last), -1)


class _Floors:
    """From a time on, at least a state must be seen: (time, index), the index never sinking."""

    def __init__(self) -> None:
        self._times: list[int] = []
        self._indices: list[int] = []

    def raise_to(self, time: int, index: int) -> None:
        """Times come in order."""
        if not self._indices or index > self._indices[-1]:
            self._times.append(time)
            self._indices.append(index)

    def at(self, time: int) -> int:
        found = bisect_right(self._times, time)
        return self._indices[found - 1] if found else 0


def _values(fields: State) -> Iterable[tuple[str, Any]]:
    for name, value in fields.items():
        for single in value if name == "version" else [value]:
            yield name, single


class Judge:
    """Knows all changes. ``graces`` are the ns of each law, ``LAW_TRUTH`` has none."""

    def __init__(self, changes: Iterable[Changed], graces: dict[str, int]) -> None:
        self._graces = graces
        self._slots: dict[str, _Slot] = defaultdict(_Slot)
        self._directories: dict[str, list[Changed]] = defaultdict(list)
        for change in sorted(changes, key=lambda change: change.begin):
            if "/" in change.slot:
                self._slots[change.slot].add(change)
            else:
                self._directories[change.slot].append(change)

    def judge(self, looks: Iterable[Looked]) -> list[Stale]:
        """What is wrong with them, in order of time."""
        by_slot: dict[str, list[Looked]] = defaultdict(list)
        for look in looks:
            by_slot[look.slot].append(look)
        directories = {name: by_slot.pop(name) for name in list(by_slot) if "/" not in name}
        sentinels = {
            name.rpartition("/")[0]: self._sentinel(name, seen)
            for name, seen in by_slot.items()
            if name.rpartition("/")[2] == SENTINEL
        }
        found = [stale for name, seen in directories.items() for stale in self._judge_directory(name, seen)]
        for name, seen in by_slot.items():
            found += self._judge_slot(self._slots[name], seen, sentinels.get(name.rpartition("/")[0], []))
        return sorted(found, key=lambda stale: stale.look.begin)

    def _sentinel(self, name: str, looks: list[Looked]) -> list[tuple[int, int]]:
        """When the sentinel was seen, and when that state of it began."""
        slot = self._slots[name]
        seen = []
        for look in sorted(looks, key=lambda look: look.end):
            indices = [
                slot.earliest(field, value, 0, self._last(slot, look))
                for field, value in _values(look.fields)
            ]
            index = max(indices, default=-1)
            if index > 0:
                seen.append((look.end, slot.begins[index]))
        return seen

    @staticmethod
    def _last(slot: _Slot, look: Looked) -> int:
        """The last state that it can have seen."""
        return bisect_right(slot.begins, look.end) - 1

    def _judge_slot(self, slot: _Slot, looks: list[Looked], sentinel: list[tuple[int, int]]) -> list[Stale]:
        floors = {law: _Floors() for law in (LAW_TIME, LAW_ORDER, LAW_SENTINEL)}
        for index, end in enumerate(slot.ends):
            floors[LAW_TIME].raise_to(end, index)
        for end, began in sentinel:
            floors[LAW_SENTINEL].raise_to(end, bisect_right(slot.ends, began) - 1)
        for look in sorted(looks, key=lambda look: look.end):
            for name, value in _values(look.fields):
                # The least that it has seen for certain: of equal values the first.
                floors[LAW_ORDER].raise_to(look.end, slot.earliest(name, value, 0, self._last(slot, look)))
        return [stale for look in looks for stale in self._judge_look(slot, look, floors)]

    def _judge_look(self, slot: _Slot, look: Looked, floors: dict[str, _Floors]) -> Iterable[Stale]:
        last = self._last(slot, look)
        settled = floors[LAW_TIME].at(look.begin - self._graces[LAW_TIME])
        for name, value in _values(look.fields):
            if not slot.fits(name, value, 0, last):
                if settled == last:
                    yield self._stale(LAW_TRUTH, slot, look, name, value, settled)
                continue
            for law, found in floors.items():
                least = found.at(look.begin - self._graces[law])
                if not slot.fits(name, value, least, last):
                    yield self._stale(law, slot, look, name, value, least)
                    break

    @staticmethod
    def _stale(law: str, slot: _Slot, look: Looked, name: str, value: Any, least: int) -> Stale:
        return Stale(law, look, name, value, slot.states[least], look.begin - slot.ends[least])

    def _judge_directory(self, name: str, looks: list[Looked]) -> Iterable[Stale]:
        for stamp in ("mtime", "ctime"):
            made = [(change.end, change.state) for change in self._directories[name]]
            seen = [(look.end, look.fields) for look in looks]
            laws = {LAW_TIME: _highest(made, stamp), LAW_ORDER: _highest(seen, stamp)}
            for look in looks:
                for law, (times, highest) in laws.items():
                    at = bisect_right(times, look.begin - self._graces[law]) - 1
                    if at >= 0 and look.fields.get(stamp, highest[at]) < highest[at]:
                        least = {stamp: highest[at]}
                        yield Stale(law, look, stamp, look.fields[stamp], least, look.begin - times[at])


def _highest(values: list[tuple[int, State]], stamp: str) -> tuple[list[int], list[int]]:
    """Times, and the highest ``stamp`` up to each of them."""
    ordered = sorted((time, state[stamp]) for time, state in values if stamp in state)
    return [time for time, _ in ordered], list(accumulate((value for _, value in ordered), max))


# --- what was written down -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Account:
    """All that several processes did and saw, and what went ``wrong`` for them."""

    changes: list[Changed] = field(default_factory=list)
    looks: list[Looked] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, log: list[list[Any]], slots: list[str]) -> None:
        """Take the log of a ``storm.py``. Of a listing each of ``slots`` in the directory is judged."""
        for kind, slot, *rest in log:
            if kind == "wrong":
                self.wrong.append(f"{slot}: {rest[0]}")
            elif kind == "changed":
                self.changes.append(Changed(slot, *rest))
            elif "names" in rest[2]:
                begin, end, fields = rest
                names = set(fields["names"])
                for one in slots:
                    directory, _, name = one.partition("/")
                    if directory == slot:
                        self.looks.append(Looked(one, begin, end, {"listed": name in names}))
            else:
                self.looks.append(Looked(slot, *rest))
