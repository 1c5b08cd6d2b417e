from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from host_agent.errors import UserError
from host_agent.paths import Home
from host_agent.remote.session import session_name


@pytest.fixture
def machine_id(tmp_path: Path) -> Path:
    path = tmp_path / "machine-id"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    return path


def test_it_stays_the_same_and_says_whose_it_is(home: Home, machine_id: Path) -> None:
    name = session_name(home, "box", machine_id)
    assert re.fullmatch("box-[0-9a-f]{16}", name)
    assert session_name(Home(home.root), "box", machine_id) == name
    assert re.fullmatch("[a-z0-9-]{1,40}", session_name(home, "a" * 32, machine_id))


def test_no_other_instance_home_or_host_has_it(home: Home, machine_id: Path, tmp_path: Path) -> None:
    names = {session_name(home, "box", machine_id), session_name(home, "box2", machine_id)}
    # A copy of the folder on another host; another user's on the same; a host without an id.
    other = tmp_path / "other"
    other.write_text("fedcba9876543210fedcba9876543210\n")
    names.add(session_name(home, "box", other))
    names.add(session_name(home, "box", tmp_path / "missing"))
    copy = Home(tmp_path / "copy")
    shutil.copytree(home.root, copy.root)
    names.add(session_name(copy, "box", machine_id))
    fresh = Home(tmp_path / "fresh")
    fresh.root.mkdir()
    names.add(session_name(fresh, "box", machine_id))
    assert len(names) == 6
    # Names so long that they begin alike.
    assert session_name(home, "a" * 31 + "1", machine_id) != session_name(home, "a" * 31 + "2", machine_id)


def test_a_home_that_cannot_be_written_to_is_a_sentence(tmp_path: Path, machine_id: Path) -> None:
    with pytest.raises(UserError, match="attach-id"):
        session_name(Home(tmp_path / "missing"), "box", machine_id)
