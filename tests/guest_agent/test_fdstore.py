from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent import fdstore
from guest_agent.fdstore import StoredConnection

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def receive(manager: socket.socket) -> tuple[bytes, list[int]]:
    message, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(64))
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data)
    return message, list(fds)


def test_the_manager_is_given_a_copy_and_its_name(manager: socket.socket) -> None:
    reading, writing = os.pipe()
    assert fdstore.store(writing, "a,name=1")
    os.close(writing)
    message, (copy,) = receive(manager)
    assert message == b"FDSTORE=1\nFDNAME=a,name=1"
    os.write(copy, b"still open")
    assert os.read(reading, 100) == b"still open"
    os.close(copy)
    os.close(reading)


def test_the_manager_is_told_to_forget(manager: socket.socket) -> None:
    assert fdstore.remove("a,name=1")
    assert receive(manager) == (b"FDSTOREREMOVE=1\nFDNAME=a,name=1", [])


def test_a_manager_may_listen_on_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"agentctl-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        assert fdstore.notify("READY=1")
        assert receive(listener) == (b"READY=1", [])


def test_without_a_manager_nothing_is_stored_and_nothing_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not fdstore.store(0, "name")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "absent"))
    assert not fdstore.store(0, "name")


@pytest.mark.parametrize("name", ["", "a:b", "line\nFDSTORE=1", "umläut", "x" * 256])
def test_a_name_that_the_manager_would_refuse_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        fdstore.store(0, name)


TAKE = """
import os, sys
from guest_agent import fdstore
first = fdstore.take()
print([(item.name, item.fd, os.get_inheritable(item.fd)) for item in first])
print(fdstore.take(), [name for name in os.environ if name.startswith("LISTEN_")])
"""
EXEC = """
import os, sys
for fd in (3, 4):
    os.dup2(0, fd)
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""


def take(pid_offset: int, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", EXEC, str(pid_offset), TAKE],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.splitlines()


def test_what_was_stored_comes_back_once_and_no_child_inherits_it() -> None:
    said = take(0, LISTEN_FDS="2", LISTEN_FDNAMES="one:two")
    assert said == ["[('one', 3, False), ('two', 4, False)]", "[] []"]


def test_descriptors_without_names_are_unknown_and_still_owned() -> None:
    assert take(0, LISTEN_FDS="2")[0] == "[('unknown', 3, False), ('unknown', 4, False)]"
    assert take(0, LISTEN_FDS="2", LISTEN_FDNAMES="one")[0] == "[('one', 3, False), ('unknown', 4, False)]"


def test_what_is_meant_for_another_process_is_left_alone() -> None:
    assert take(1, LISTEN_FDS="2", LISTEN_FDNAMES="one:two") == ["[]", "[] []"]
    assert take(0, LISTEN_FDS="many") == ["[]", "[] []"]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**20),
    st.integers(0, 99),
    st.integers(0, 2**64 - 1),
    st.booleans(),
)
def test_a_name_says_all_that_a_successor_must_know(
    share: int, device: int, minor: int, flags: int, locks: bool
) -> None:
    connection = StoredConnection(share, device, minor, flags, locks)
    name = connection.name()
    assert len(name) <= fdstore.MAX_NAME
    assert name.isascii()
    assert name.isprintable()
    assert ":" not in name
    assert StoredConnection.parse(name) == connection
    assert StoredConnection.parse(name + ",later=1,too") == connection


@pytest.mark.parametrize(
    "name",
    ["", "unknown", "agentctl-files", "agentctl-files,share=1,device=2,minor=x,flags=0x0", "other,share=1"],
)
def test_other_names_are_none_of_ours(name: str) -> None:
    assert StoredConnection.parse(name) is None
