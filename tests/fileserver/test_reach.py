"""Files that are found again, and those that are not, with very few descriptors."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fileserver import linux, reach
from protocol.files import (
    ROOT,
    Create,
    Forget,
    GetAttributes,
    Lookup,
    MakeDirectory,
    MakeNode,
    Read,
    RemoveDirectory,
    Rename,
    Unlink,
    Write,
)
from tests.fileserver.served import Served, attr, open_descriptors, refused, serving


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[Served]:
    """No descriptor of a node outlives the next call."""
    with serving(tmp_path, max_descriptors=1) as share:
        yield share


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, max_descriptors=1000) as share:
        yield share


def evict(share: Served) -> None:
    """Every descriptor held so far is closed."""
    (share.path / "other").touch()
    share.ask(Lookup, ROOT, b"other")
    share.tree.close_idle(float("inf"))


def test_descriptors_are_bounded(tmp_path: Path) -> None:
    for index in range(100):
        (tmp_path / str(index)).touch()
    with serving(tmp_path, max_descriptors=10) as share:
        before = len(open_descriptors())
        nodes = [share.node(str(index)) for index in range(100)]
        assert len(open_descriptors()) <= before + 10
        assert share.tree.describe().descriptors == 11
        for index, node in enumerate(nodes):
            assert attr(share.ask(GetAttributes, node)).ino == os.stat(tmp_path / str(index)).st_ino
        assert share.tree.describe().lost == 0


def test_a_deep_file_is_found_again(tight: Served) -> None:
    depth = 300
    node = ROOT
    for _ in range(depth):
        node = tight.ask(MakeDirectory, node, b"d", 0o755).node
    file = tight.ask(Create, node, b"f", 0o644, os.O_RDWR).node
    tight.ask(Write, file, 0, payload=b"deep")
    evict(tight)
    assert tight.bytes(Read, file, 0, 10) == b"deep"


def test_renamed_on_the_host_and_held(roomy: Served) -> None:
    (roomy.path / "f").write_text("same")
    node = roomy.node("f")
    os.rename(roomy.path / "f", roomy.path / "g")
    assert roomy.bytes(Read, node, 0, 10) == b"same"
    assert roomy.refused(Lookup, ROOT, b"f") == "ENOENT"
    assert roomy.node("g") == node


def test_renamed_on_the_host_and_not_held_is_stale_and_counted(tight: Served) -> None:
    (tight.path / "f").write_text("same")
    node = tight.node("f")
    evict(tight)
    os.rename(tight.path / "f", tight.path / "g")
    assert tight.refused(Read, node, 0, 10) == "ESTALE"
    assert tight.refused(GetAttributes, node) == "ESTALE"
    assert tight.tree.describe().lost == 1
    assert tight.node("g") == node
    assert tight.bytes(Read, node, 0, 10) == b"same"


def test_another_file_of_the_same_name_is_never_served(tight: Served) -> None:
    (tight.path / "f").write_text("old")
    node = tight.node("f")
    evict(tight)
    (tight.path / "f").rename(tight.path / "kept")
    (tight.path / "f").write_text("new")
    assert tight.refused(Read, node, 0, 10) == "ESTALE"
    new = tight.node("f")
    assert new != node
    assert tight.bytes(Read, new, 0, 10) == b"new"


def test_a_directory_on_the_way_was_replaced(tight: Served) -> None:
    (tight.path / "d").mkdir()
    (tight.path / "d" / "f").write_text("old")
    node = tight.node("d/f")
    evict(tight)
    os.rename(tight.path / "d", tight.path / "kept")
    shutil.copytree(tight.path / "kept", tight.path / "d")
    assert tight.refused(Read, node, 0, 10) == "ESTALE"
    (tight.path / "d" / "f").unlink()
    (tight.path / "d").rmdir()
    (tight.path / "d").symlink_to("kept")
    assert tight.refused(Read, node, 0, 10) == "ESTALE"
    (tight.path / "d").unlink()
    (tight.path / "d").write_text("a file")
    assert tight.refused(Read, node, 0, 10) == "ESTALE"
    (tight.path / "d").unlink()
    os.rename(tight.path / "kept", tight.path / "d")
    assert tight.bytes(Read, node, 0, 10) == b"old"
    assert tight.tree.describe().lost == 1


def test_one_of_several_names_is_enough(tight: Served) -> None:
    (tight.path / "a").write_text("linked")
    for name in ("b", "c"):
        os.link(tight.path / "a", tight.path / name)
    node = {tight.node(name) for name in "abc"}.pop()
    evict(tight)
    os.unlink(tight.path / "c")
    os.unlink(tight.path / "b")
    assert tight.bytes(Read, node, 0, 10) == b"linked"


def test_directories_moved_into_each_other_on_the_host(tight: Served) -> None:
    """The table has a circle then: each is where the other was seen in."""
    (tight.path / "a" / "b").mkdir(parents=True)
    b = tight.node("a/b")
    a = tight.node("a")
    evict(tight)
    os.rename(tight.path / "a" / "b", tight.path / "b")
    os.rename(tight.path / "a", tight.path / "b" / "a")
    assert tight.refused(GetAttributes, b) == "ESTALE"
    assert tight.refused(GetAttributes, a) == "ESTALE"
    assert (tight.node("b"), tight.node("b/a")) == (b, a)
    assert tight.ask(GetAttributes, a)


def test_unknown_and_forgotten_numbers(roomy: Served) -> None:
    (roomy.path / "f").touch()
    node = roomy.node("f")
    roomy.node("f")
    roomy.forget(node, 2)
    for number in (node, 0, -1, 12345, 1 << 80):
        assert roomy.refused(GetAttributes, number) == "ESTALE"
    assert roomy.tree.describe().lost == 0
    assert roomy.node("f") > node


def test_forgetting_closes(roomy: Served) -> None:
    before = len(open_descriptors())
    node = roomy.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node
    roomy.ask(Write, node, 0, payload=b"x")
    roomy.ask(Unlink, ROOT, b"f")
    assert len(open_descriptors()) > before
    roomy.forget(node)
    assert len(open_descriptors()) == before


def test_the_process_runs_out_of_descriptors(roomy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        (roomy.path / str(index)).touch()
        roomy.bytes(Read, roomy.node(str(index)), 0, 1)
    (roomy.path / "new").write_text("new")
    failing = [24]
    opened = os.open

    def full_once(*arguments: object, **named: object) -> int:
        if failing:
            raise OSError(failing.pop(), "too many")
        return opened(*arguments, **named)  # type: ignore[arg-type]

    held = roomy.tree.describe().descriptors
    monkeypatch.setattr(reach.linux.os, "open", full_once)
    node = roomy.node("new")
    assert roomy.tree.describe().descriptors < held - 15
    assert roomy.bytes(Read, node, 0, 3) == b"new"


@pytest.mark.parametrize("over", [False, True])
def test_a_file_that_is_not_held_is_kept_when_it_loses_its_name(tmp_path: Path, over: bool) -> None:
    with serving(tmp_path, max_descriptors=3) as share:
        nodes = []
        for name in ("a", "b", "c"):
            (share.path / name).write_text(name)
            nodes.append(share.node(name))
        for index in range(5):
            (share.path / f"other{index}").touch()
            share.ask(Lookup, ROOT, b"other%d" % index)
        for index, name in enumerate((b"a", b"b", b"c")):
            if over:
                share.ask(Rename, ROOT, b"other%d" % index, ROOT, name)
            else:
                share.ask(Unlink, ROOT, name)
        assert [share.bytes(Read, node, 0, 9) for node in nodes] == [b"a", b"b", b"c"]


def test_unnamed_files_are_bounded_too(tight: Served) -> None:
    nodes = [tight.ask(MakeNode, ROOT, b"%d" % index, 0o600).node for index in range(10)]
    before = len(open_descriptors())
    for index in range(10):
        tight.ask(Unlink, ROOT, b"%d" % index)
    assert len(open_descriptors()) <= before + 2
    assert [tight.refused(GetAttributes, node) for node in nodes].count("0") == 1


def test_a_file_deleted_on_the_host_gives_its_space_back(roomy: Served) -> None:
    """The guest is told to drop the name, once; what it still has open goes on working."""
    (roomy.path / "big").write_text("x")
    (roomy.path / "stays").write_text("x")
    node, stays = roomy.node("big"), roomy.node("stays")
    os.unlink(roomy.path / "big")
    assert roomy.tree.names_gone(1000.0) == []
    assert roomy.ask(GetAttributes, node)
    assert roomy.tree.names_gone(1020.0) == [], "it was used in between"
    assert roomy.tree.names_gone(1025.0) == [], "too early for another look"
    assert roomy.tree.names_gone(1040.0) == [(ROOT, b"big")]
    assert roomy.tree.names_gone(1060.0) == []
    assert attr(roomy.ask(GetAttributes, node)).nlink == 0
    descriptors = len(open_descriptors())
    roomy.ask(Forget, 0, [node], [1])
    assert len(open_descriptors()) == descriptors - 1
    assert roomy.refused(GetAttributes, node) == "ESTALE"
    assert roomy.ask(GetAttributes, stays)


def test_a_look_that_fails_holds_nothing(roomy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    (roomy.path / "f").touch()
    node = roomy.node("f")
    roomy.tree.names_gone(1000.0)
    descriptors = len(open_descriptors())
    with monkeypatch.context() as broken:
        broken.setattr(linux, "fstatx", raising(errno.ESTALE))
        assert roomy.tree.names_gone(1020.0) == []
    roomy.ask(Forget, 0, [node], [1])
    assert len(open_descriptors()) == descriptors - 1


def raising(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_what_the_guest_unlinked_is_not_swept(roomy: Served) -> None:
    node = roomy.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node
    roomy.ask(Unlink, ROOT, b"f")
    for now in range(1000, 1200, 20):
        assert roomy.tree.names_gone(float(now)) == []
    assert attr(roomy.ask(GetAttributes, node)).nlink == 0


# --- after a kill ---------------------------------------------------------------------------------------


def test_nodes_outlive_the_process(roomy: Served) -> None:
    (roomy.path / "d").mkdir()
    (roomy.path / "d" / "f").write_text("f")
    node = roomy.node("d/f")
    roomy.ask(Rename, roomy.node("d"), b"f", ROOT, b"moved")
    roomy.restart()
    assert roomy.bytes(Read, node, 0, 10) == b"f"
    assert roomy.node("moved") == node
    (roomy.path / "new").touch()
    assert roomy.node("new") > node


def test_a_file_replaced_while_nobody_served(roomy: Served) -> None:
    (roomy.path / "f").write_text("old")
    node = roomy.node("f")
    roomy.tree.close()
    os.rename(roomy.path / "f", roomy.path / "kept")
    (roomy.path / "f").write_text("new")
    roomy.restart()
    assert roomy.refused(Read, node, 0, 10) == "ESTALE"
    assert roomy.node("f") != node
    assert roomy.node("kept") == node


def test_an_unlinked_file_does_not_survive_a_kill(roomy: Served) -> None:
    node = roomy.ask(Create, ROOT, b"f", 0o600, os.O_RDWR).node
    roomy.ask(Unlink, ROOT, b"f")
    roomy.restart()
    assert roomy.refused(Read, node, 0, 1) == "ESTALE"


def test_forgotten_nodes_are_not_restored(roomy: Served) -> None:
    (roomy.path / "f").touch()
    node = roomy.node("f")
    roomy.forget(node)
    assert node not in roomy.journal.records
    roomy.restart()
    assert roomy.refused(GetAttributes, node) == "ESTALE"


# --- threads --------------------------------------------------------------------------------------------


def test_many_threads_and_hardly_any_descriptors(tmp_path: Path) -> None:
    """Each thread's files hold its own content: a descriptor closed or reused under a call would show."""
    with serving(tmp_path, max_descriptors=2) as share:
        shared = share.ask(MakeDirectory, ROOT, b"shared", 0o755).node
        failures: list[str] = []

        def work(number: int) -> None:
            try:
                _work(share, shared, b"%d" % number)
            except BaseException as error:
                failures.append(f"{number}: {error!r}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert share.tree.describe().nodes == 2
        assert share.tree.describe().lost == 0


def test_a_directory_above_is_renamed_during_the_walk(tight: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    (tight.path / "a" / "b").mkdir(parents=True)
    (tight.path / "a" / "b" / "f").write_text("found")
    node = tight.node("a/b/f")
    evict(tight)
    walk = reach.linux.open_entry
    renames = [(b"x", b"a"), (b"a", b"x")]

    def rename_first(directory: int, name: bytes) -> int:
        if renames and name == renames[-1][0]:
            old, new = renames.pop()
            tight.ask(Rename, ROOT, old, ROOT, new)
        return walk(directory, name)

    monkeypatch.setattr(reach.linux, "open_entry", rename_first)
    assert tight.bytes(Read, node, 0, 10) == b"found"
    assert tight.tree.describe().lost == 0


def _work(share: Served, shared: int, me: bytes) -> None:
    for round_ in range(40):
        directory = share.ask(MakeDirectory, shared, me, 0o755).node
        node = share.ask(Create, directory, b"f", 0o644, os.O_RDWR).node
        content = me * 100 + b"%d" % round_
        share.ask(Write, node, 0, payload=content)
        share.ask(Rename, directory, b"f", shared, b"moved" + me)
        assert share.bytes(Read, node, 0, 4096) == content
        assert share.node(b"shared/moved" + me) == node
        share.ask(Unlink, shared, b"moved" + me)
        assert share.bytes(Read, node, 0, 4096) == content
        share.forget(node, 2)
        assert refused(lambda node=node: share.ask(GetAttributes, node)) == "ESTALE"
        share.ask(RemoveDirectory, shared, me)
        share.forget(directory)
        share.forget(shared)
