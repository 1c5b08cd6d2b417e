from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from fileserver import data, tree
from fileserver.tree import Stage
from protocol.files import CALLS, ROOT, Create, GetAttributes, Lookup, OpenForLocks, Read, Unlink, Write
from tests.fileserver.served import Served, refused, serving


def test_every_call_is_served_but_those_about_locks(tmp_path: Path) -> None:
    with serving(tmp_path) as share:
        assert set(share.tree._methods) == {kind for kind in CALLS.values() if kind.OP < 40}
        assert share.refused(OpenForLocks, ROOT, os.O_RDONLY) == "ENOSYS"


def test_numbers_come_from_whoever_gives_them_out(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "g").touch()
    numbers = iter([700, 900])
    with serving(tmp_path, next_node=numbers.__next__) as share:
        assert [share.node("f"), share.node("g"), share.node("f")] == [700, 900, 700]


def test_state(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("f")
    with serving(tmp_path) as share:
        share.bytes(Read, share.node("f"), 0, 1)
        state = share.tree.describe()
        assert (state.stage, state.reason, state.nodes, state.descriptors) == (Stage.SERVING, "", 2, 3)
        assert (state.lost, state.full) == (0, False)


def test_a_full_disk_is_a_state_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as share:
        node = share.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(data.os, "pwrite", full)
        assert share.refused(Write, node, 0, payload=b"x") == "ENOSPC"
        assert share.tree.describe().full
        monkeypatch.setattr(tree.time, "monotonic", lambda: 1e9)
        assert share.tree.check_root()
        assert not share.tree.describe().full


@pytest.mark.parametrize(
    ("raised", "answered"),
    [(OSError("no number"), "EIO"), (OSError(errno.EBADF, ""), "ESTALE"), (OverflowError(), "EINVAL")],
)
def test_every_failure_has_an_errno(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, answered: str
) -> None:
    with serving(tmp_path) as share:

        def fail(*_: object) -> None:
            raise raised

        share.tree._methods[GetAttributes] = fail  # type: ignore[assignment]
        assert share.refused(GetAttributes, ROOT) == answered


def test_threads_on_the_same_names(tmp_path: Path) -> None:
    """Whatever the order, nothing but an errno comes out, and the table is empty when all is forgotten."""
    with serving(tmp_path, max_descriptors=3) as share:
        failures: list[str] = []

        def work() -> None:
            try:
                for round_ in range(150):
                    _make_use_and_remove(share, b"%d" % (round_ % 3))
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert share.tree.describe().nodes == 1
        assert set(share.journal.records) == {ROOT}


def _make_use_and_remove(share: Served, name: bytes) -> None:
    """Others remove the name at any moment, and another thread's file may be found by it."""
    gone = {"ENOENT", "ESTALE"}
    made: list[int] = []
    error = refused(lambda: made.append(share.ask(Create, ROOT, name, 0o644, os.O_RDWR).node))
    assert error in gone | {"0"}
    for node in made:
        assert share.refused(Write, node, 0, payload=b"x" * 100) in gone | {"0"}
        assert share.refused(GetAttributes, node) in gone | {"0"}
        assert refused(lambda node=node: share.bytes(Read, node, 0, 100)) in gone | {"0"}
        assert refused(lambda: share.forget(share.ask(Lookup, ROOT, name).node)) in gone | {"0"}
        assert share.refused(Unlink, ROOT, name) in gone | {"0"}
        share.forget(node)
