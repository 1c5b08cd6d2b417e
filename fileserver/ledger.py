"""What the journal's entries mean, sans-IO: entries in, the state they add up to out.

An entry is a msgpack array whose first element is its ``Kind``. The laws:
- Every prefix of a journal is a state that is safe to go on from. A lookup too many keeps a node for longer;
  one too few would lose a file under the guest's hands. So a name is written before it is counted, what
  gives lookups back is recorded as done before it is done, and what changes the disk after its intent.
- Entries are absolute ("its lookups are now 3"), but for the links of a node, which come and go by name.
- Entries of a kind this version does not know are passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, TypeVar

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

#: Changing calls whose outcome is kept. A link carries 1,024 calls at a time (MAX_CALLS), so whatever may be
#: asked again is among the last 1,024 that were answered. The rest is room for a guest that is slow to notice.
MAX_OUTCOMES: Final = 4096

FORMAT: Final = 1
"""Changes when entries change their meaning; a journal of another format is not read."""

Entry = list[Any]
CallKey = tuple[int, int]
"""(share, unique)"""


class Kind(IntEnum):
    """The first element of an entry; what follows it."""

    BEGIN = 0  # format, boot_id of the guest
    NODE = 1  # share, node, parent, name, device, inode, birth_ns
    UNLINKED = 2  # share, node, parent, name
    COUNTED = 3  # share, node, lookups
    INTENT = 4  # share, unique, digest, precondition
    OUTCOME = 5  # share, unique, digest, errno, value
    HANDLE = 6  # share, handle, node
    RELEASED = 7  # share, handle
    WHOLE = 8  # share, handle, kind
    RANGES = 9  # share, node, owner, [[start, end, kind], ...]
    DROPPED = 10  # share
    NUMBERS = 11  # last node, last handle
    THROUGH = 12  # share, node, owner, handle: of ranges that were locked before


@dataclass(slots=True)
class NodeRecord:
    """A node as the guest knows it. One without lookups is there only for what is in it."""

    device: int
    inode: int
    birth_ns: int
    lookups: int = 0
    links: dict[tuple[int, bytes], None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Intent:
    """A call that was begun. ``digest`` names its content, ``precondition`` is the tree's own."""

    digest: int
    precondition: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A call that is done: its errno, or 0 and the encoded result. ``digest`` as in ``Intent``."""

    digest: int
    errno: int
    value: object = None


@dataclass(slots=True)
class LockRecord:
    """The locks of one share: what each handle is open on, who holds what, and through which handles."""

    handles: dict[int, int] = field(default_factory=dict)
    whole: dict[int, int] = field(default_factory=dict)
    ranges: dict[tuple[int, int], list[tuple[int, int, int]]] = field(default_factory=dict)
    through: dict[tuple[int, int], set[int]] = field(default_factory=dict)


class Recent(dict[KeyT, ValueT]):
    """A mapping that forgets its oldest entry when it has ``limit`` of them."""

    def __init__(self, limit: int = MAX_OUTCOMES) -> None:
        super().__init__()
        self.limit = limit

    def remember(self, key: KeyT, value: ValueT) -> None:
        """Add an entry, as the youngest."""
        self.pop(key, None)
        if len(self) >= self.limit:
            del self[next(iter(self))]
        self[key] = value


class Ledger:
    """The state after the entries that were applied."""

    def __init__(self) -> None:
        self.boot_id = ""
        self.last_node = 0
        self.last_handle = 0
        self.nodes: dict[int, dict[int, NodeRecord]] = {}
        self.locks: dict[int, LockRecord] = {}
        self.intents: Recent[CallKey, Intent] = Recent()
        self.outcomes: Recent[CallKey, Answer] = Recent()

    def apply(self, entry: Entry) -> None:
        """Take one entry into account. Raises ``ValueError`` or ``TypeError`` when it has not the shape of its kind."""
        action = _ACTIONS.get(entry[0])
        if action is not None:
            action(self, *entry[1:])

    def entries(self) -> Iterator[Entry]:
        """The shortest journal with this state."""
        self.prune()
        yield [Kind.BEGIN, FORMAT, self.boot_id]
        yield [Kind.NUMBERS, self.last_node, self.last_handle]
        for share, nodes in self.nodes.items():
            yield from node_entries(share, nodes)
        for share, locks in self.locks.items():
            yield from _lock_entries(share, locks)
        for (share, unique), intent in self.intents.items():
            yield [Kind.INTENT, share, unique, intent.digest, intent.precondition]
        for (share, unique), answer in self.outcomes.items():
            yield [Kind.OUTCOME, share, unique, answer.digest, answer.errno, answer.value]

    def prune(self) -> None:
        """Drop the nodes that the guest has forgotten, but not a directory of one that it has not."""
        for nodes in self.nodes.values():
            children = Counter(parent for record in nodes.values() for parent, _ in record.links)
            doomed = [node for node, record in nodes.items() if not record.lookups and not children[node]]
            while doomed:
                for parent, _ in nodes.pop(doomed.pop()).links:
                    children[parent] -= 1
                    if not children[parent] and parent in nodes and not nodes[parent].lookups:
                        doomed.append(parent)

    # --- one for each kind -------------------------------------------------------------------------

    def _begin(self, _form: int, boot_id: str) -> None:
        self.boot_id = boot_id

    def _node(
        self, share: int, node: int, parent: int, name: bytes, device: int, inode: int, birth_ns: int
    ) -> None:
        self.last_node = max(self.last_node, node)
        nodes = self.nodes.setdefault(share, {})
        if (record := nodes.get(node)) is None:
            record = nodes[node] = NodeRecord(device, inode, birth_ns)
        record.device, record.inode, record.birth_ns = device, inode, birth_ns
        if name:
            record.links[parent, name] = None

    def _unlinked(self, share: int, node: int, parent: int, name: bytes) -> None:
        if (record := self.nodes.get(share, {}).get(node)) is not None:
            record.links.pop((parent, name), None)

    def _counted(self, share: int, node: int, lookups: int) -> None:
        if (record := self.nodes.get(share, {}).get(node)) is not None:
            record.lookups = lookups

    def _intent(self, share: int, unique: int, digest: int, precondition: bytes) -> None:
        # The outcome was of another call, which a connection that is gone had given this name.
        self.outcomes.pop((share, unique), None)
        self.intents.remember((share, unique), Intent(digest, precondition))

    def _outcome(self, share: int, unique: int, digest: int, errno: int, value: object) -> None:
        self.intents.pop((share, unique), None)
        self.outcomes.remember((share, unique), Answer(digest, errno, value))

    def _locks_of(self, share: int) -> LockRecord:
        return self.locks.setdefault(share, LockRecord())

    def _handle(self, share: int, handle: int, node: int) -> None:
        self.last_handle = max(self.last_handle, handle)
        self._locks_of(share).handles[handle] = node

    def _released(self, share: int, handle: int) -> None:
        locks = self._locks_of(share)
        locks.handles.pop(handle, None)
        locks.whole.pop(handle, None)

    def _whole(self, share: int, handle: int, kind: int) -> None:
        self._locks_of(share).whole[handle] = kind

    def _ranges(self, share: int, node: int, owner: int, ranges: list[list[int]]) -> None:
        locks = self._locks_of(share)
        if ranges:
            locks.ranges[node, owner] = [(start, end, kind) for start, end, kind in ranges]
        else:
            locks.ranges.pop((node, owner), None)
            locks.through.pop((node, owner), None)

    def _through(self, share: int, node: int, owner: int, handle: int) -> None:
        locks = self._locks_of(share)
        if (node, owner) in locks.ranges:
            locks.through.setdefault((node, owner), set()).add(handle)

    def _dropped(self, share: int) -> None:
        self.nodes.pop(share, None)
        self.locks.pop(share, None)
        for table in (self.intents, self.outcomes):
            for key in [key for key in table if key[0] == share]:
                del table[key]

    def _numbers(self, last_node: int, last_handle: int) -> None:
        self.last_node = max(self.last_node, last_node)
        self.last_handle = max(self.last_handle, last_handle)


def node_entries(share: int, nodes: dict[int, NodeRecord]) -> Iterator[Entry]:
    """What makes these records: of each its names, and then how often it was looked up."""
    for node, record in nodes.items():
        identity = [record.device, record.inode, record.birth_ns]
        for parent, name in record.links or {(0, b""): None}:
            yield [Kind.NODE, share, node, parent, name, *identity]
        if record.lookups > 0:
            yield [Kind.COUNTED, share, node, record.lookups]


def _lock_entries(share: int, locks: LockRecord) -> Iterator[Entry]:
    for handle, node in locks.handles.items():
        yield [Kind.HANDLE, share, handle, node]
    for handle, kind in locks.whole.items():
        yield [Kind.WHOLE, share, handle, kind]
    for (node, owner), ranges in locks.ranges.items():
        yield [Kind.RANGES, share, node, owner, [list(piece) for piece in ranges]]
        for handle in locks.through.get((node, owner), ()):
            yield [Kind.THROUGH, share, node, owner, handle]


_ACTIONS: Final[dict[int, Callable[..., None]]] = {
    Kind.BEGIN: Ledger._begin,
    Kind.NODE: Ledger._node,
    Kind.UNLINKED: Ledger._unlinked,
    Kind.COUNTED: Ledger._counted,
    Kind.INTENT: Ledger._intent,
    Kind.OUTCOME: Ledger._outcome,
    Kind.HANDLE: Ledger._handle,
    Kind.RELEASED: Ledger._released,
    Kind.WHOLE: Ledger._whole,
    Kind.RANGES: Ledger._ranges,
    Kind.DROPPED: Ledger._dropped,
    Kind.NUMBERS: Ledger._numbers,
    Kind.THROUGH: Ledger._through,
}
