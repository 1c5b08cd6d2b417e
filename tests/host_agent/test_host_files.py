from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from host_agent import host_files
from host_agent.host_files import WatchedFile
from host_agent.network_settings import MAX_NAMESERVERS, Nameserver


def test_hosts() -> None:
    text = """
    # a comment
    127.0.0.1 localhost  # another
    ::1 localhost ip6-localhost
    192.0.2.7\tDB.example db
    192.0.2.8 db.example.
    192.0.2.8 db.example
    192.0.2.999 wrong
    nonsense
    fe80::1%eth0 router
    """
    assert host_files.hosts(text) == {
        "localhost": ("127.0.0.1", "::1"),
        "ip6-localhost": ("::1",),
        "db.example": ("192.0.2.7", "192.0.2.8"),
        "db": ("192.0.2.7",),
        "router": ("fe80::1%eth0",),
    }


def test_nameservers() -> None:
    text = "search corp.example\nnameserver 192.0.2.53\n nameserver  ::1 # x\nnameserver none\nnameserver\n"
    assert host_files.nameservers(text) == (Nameserver("192.0.2.53"), Nameserver("::1"))
    many = "".join(f"nameserver 192.0.2.{number}\n" for number in range(20))
    assert len(host_files.nameservers(many)) == MAX_NAMESERVERS


async def test_a_file_is_read_again_when_it_has_changed_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    parsed: list[str] = []

    def parse(text: str) -> str:
        parsed.append(text)
        return text

    file = WatchedFile(path, parse)
    assert await file.current() == ""
    path.write_text("one")
    assert [await file.current() for _ in range(3)] == ["one"] * 3
    assert parsed.count("one") == 1
    # As editors do it: another file of that name, here with the old one's time.
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    (tmp_path / "new").write_text("two")
    os.utime(tmp_path / "new", ns=times)
    (tmp_path / "new").rename(path)
    assert await file.current() == "two"
    path.unlink()
    assert await file.current() == ""
    path.write_text("two")
    assert await file.current() == "two"


async def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert await WatchedFile(tmp_path, host_files.hosts).current() == {}
    (tmp_path / "bytes").write_bytes(b"\xff\xfe 192.0.2.1 x\n192.0.2.1 y\n")
    assert await WatchedFile(tmp_path / "bytes", host_files.hosts).current() == {"y": ("192.0.2.1",)}


@given(st.text(alphabet="1:a.# \t\n%", max_size=60) | st.text(max_size=60))
def test_any_text_has_names_and_servers_or_none(text: str) -> None:
    for name, addresses in host_files.hosts(text).items():
        assert name == name.lower()
        assert len(set(addresses)) == len(addresses) > 0
    assert len(host_files.nameservers(text)) <= MAX_NAMESERVERS
