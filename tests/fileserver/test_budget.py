"""The descriptors of one process, shared out."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fileserver.budget import FEWEST, MOST_NODES, Budget
from protocol.files import ROOT, Create, GetAttributes, Lookup, Read
from tests.descriptors import open_descriptors
from tests.fileserver.served import serving


class Keeper:
    def __init__(self) -> None:
        self.did: list[str] = []

    def shed(self) -> None:
        self.did.append("shed")

    def trim(self) -> None:
        self.did.append("trim")


def test_all_together_leave_room() -> None:
    for limit in (4096, 20_000, 1 << 20):
        budget = Budget(limit)
        for number in range(1, 33):
            budget.join(Keeper())
            assert number * (2 * budget.nodes + budget.data + budget.locks) <= limit * 3 // 4
            assert FEWEST <= budget.nodes <= MOST_NODES


def test_one_share_leaves_room_for_a_second() -> None:
    budget = Budget(8000)
    first, second, third = Keeper(), Keeper(), Keeper()
    budget.join(first)
    alone = (budget.nodes, budget.data, budget.locks)
    assert alone == (1000, 500, 500)
    budget.join(second)
    assert (budget.nodes, budget.data, budget.locks) == alone
    budget.join(third)
    assert (budget.nodes, budget.data, budget.locks) == (666, 333, 333)
    budget.leave(second)
    budget.leave(second)
    assert budget.nodes == 1000
    budget.shed()
    assert (first.did, second.did, third.did) == (["trim", "trim", "shed"], ["trim"], ["shed"])


def test_a_new_share_takes_its_part(tmp_path: Path) -> None:
    """Also from one that does nothing."""
    budget = Budget(16 * FEWEST * 4)
    for index in range(200):
        (tmp_path / str(index)).touch()
    with serving(tmp_path, budget=budget) as first:
        for index in range(200):
            first.bytes(Read, first.node(str(index)), 0, 1)
        limit = budget.nodes + budget.data + 1
        assert first.tree.describe().descriptors == limit
        with serving(tmp_path, budget=budget), serving(tmp_path, budget=budget):
            assert first.tree.describe().descriptors <= budget.nodes + budget.data + 1 < limit
        for index in range(200):
            first.bytes(Read, first.node(str(index)), 0, 1)
        assert first.tree.describe().descriptors == limit


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """All that the process may open are open, by somebody who gives nothing back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_descriptors())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    spare: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.open("/", os.O_PATH))
        yield
    finally:
        for descriptor in spare:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("what", ["nodes", "data"])
def test_a_share_with_nothing_to_give_up_gets_what_others_have(tmp_path: Path, what: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "poor").mkdir()
    for index in range(60):
        (tmp_path / "full" / str(index)).touch()
    budget = Budget(1 << 20)
    with serving(tmp_path / "full", budget=budget) as full:
        nodes = [full.node(str(index)) for index in range(60)]
        if what == "data":
            for node in nodes[:35]:
                full.bytes(Read, node, 0, 1)
        with serving(tmp_path / "poor", budget=budget) as poor, no_descriptors_left():
            made = poor.ask(Create, ROOT, b"new", 0o644, os.O_RDWR).node
            assert poor.ask(Lookup, ROOT, b"new").node == made
        assert full.tree.describe().descriptors <= (31 if what == "nodes" else 49)
        assert len([full.ask(GetAttributes, node) for node in nodes]) == 60


def test_a_root_is_not_missed_because_there_are_no_descriptors(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / str(index)).touch()
    with serving(tmp_path) as share:
        for index in range(20):
            share.node(str(index))
        with no_descriptors_left():
            assert not share.tree.check_root()
        assert share.ask(GetAttributes, ROOT)
