"""Watches that a test moves: what a tree promises, without a kernel that tells of anything."""

from __future__ import annotations

import itertools
from typing import Any

from fileserver.nodes import Node
from fileserver.promises import Promise
from fileserver.tree import Outcome
from fileserver.watches import Token
from protocol.files import FileCall
from tests.fileserver.served import Served


class Watched:
    """In the place of ``Watches``. ``full``: no mark is left."""

    def __init__(self) -> None:
        self.epoch = 0
        self.full = False
        self.marked: set[int] = set()
        self.heard: set[int] = set()
        self.lonely = False
        self._versions = itertools.count(1)
        self._news = itertools.count(1)

    @property
    def news(self) -> int:
        """Others do something all the time, unless it is ``lonely``."""
        return 0 if self.lonely else next(self._news)

    @property
    def is_full(self) -> bool:
        return self.full

    def token(self, node: Node) -> Token | None:
        return (self.epoch, node.version) if node.number in self.marked else None

    def sample(self, share: int, node: Node, descriptor: int = -1) -> Token | None:
        assert node.descriptor >= 0
        if not self.full:
            self.marked.add(node.number)
        return self.token(node)

    def moved(self, node: Node, token: Token | None) -> Token | None:
        node.version = next(self._versions)
        return token and (token[0], node.version)

    def stands(self, node: Node, token: Token | None) -> bool:
        return token == (self.epoch, node.version) and not node.dead

    def watch_opens(self, node: Node, descriptor: int) -> bool:
        self.heard.add(node.number)
        return True

    def hears_opens(self, node: Node) -> bool:
        return node.number in self.heard

    def forget(self, share: int, node: Node, descriptor: int = -1, name: bytes = b"") -> None:
        self.marked.discard(node.number)
        self.heard.discard(node.number)


def answer(share: Served, kind: type[FileCall[Any]], *fields: Any, **named: Any) -> Outcome:
    """What a thread has worked out, and has yet to be sent."""
    return share.tree.perform(share.call(kind, *fields, **named))


def promised(share: Served, outcome: Outcome) -> int:
    """What is promised if it is sent now."""
    if outcome.promise is None:
        return 0
    assert isinstance(outcome.promise, Promise)
    return share.tree.promised(outcome.value, outcome.promise)
