"""What the guest is answered, with a resolver of the host that a test scripts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from host_agent import host_files, resolver
from host_agent.dns_messages import Code, Type
from host_agent.dns_relay import Unanswered
from host_agent.host_files import WatchedFile
from host_agent.network_settings import Nameserver, NetworkSettings, from_json
from host_agent.resolver import FRESH, QUERY_TIME, NoSuchName, Resolver, look_up
from tests.host_agent.dns_client import Answer, ask, read
from tests.host_agent.test_dns_relay import nameserver, refuses, says

HOST = "10.0.2.2"


class Names:
    """The host's resolver: ``known``, and what it was asked."""

    def __init__(self, known: dict[str, Sequence[str] | Exception] | None = None) -> None:
        self.known = known or {}
        self.asked: list[str] = []
        self.held: threading.Event | None = None

    def __call__(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        if self.held is not None:
            self.held.wait(30)
        found = self.known.get(name, NoSuchName())
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "resolv.conf").write_text("")
    return {
        "hosts": WatchedFile(tmp_path / "hosts", host_files.hosts),
        "resolv_conf": WatchedFile(tmp_path / "resolv.conf", host_files.nameservers),
    }


async def answered(tested: Resolver, name: str, kind: int = Type.A, **options: Any) -> Answer:
    return read(await tested.answer(ask(name, kind, ident=7), **options))


@pytest.fixture
def names() -> Names:
    return Names(
        {
            "both.example": ["192.0.2.1", "2001:db8::1"],
            "nas": ["192.0.2.9"],
            "here.example": ["127.0.1.1", "::1", "fe80::1%eth0"],
            "localhost": ["127.0.0.1", "::1"],
            "nothing.example": [],
            "broken.example": Unanswered("try again"),
            "many.example": [f"192.0.2.{number}" for number in range(100)],
        }
    )


@pytest.fixture
async def plain(nursery: trio.Nursery, names: Names, files: dict[str, Any]) -> Resolver:
    tested = Resolver(NetworkSettings(), HOST, look_up=names, **files)
    await nursery.start(tested.run)
    return tested


@pytest.mark.parametrize("name", ["host.agentctl.internal", "HOST.docker.internal"])
async def test_the_host_has_names(plain: Resolver, names: Names, name: str) -> None:
    assert (await answered(plain, name)).addresses == [HOST]
    for kind in (Type.AAAA, 15):  # there is none, which is not: there is no such name
        answer = await answered(plain, name, kind)
        assert (answer.code, answer.addresses) == (Code.NO_ERROR, [])
    assert names.asked == []


async def test_what_the_host_finds_the_guest_finds(plain: Resolver, names: Names) -> None:
    assert (await answered(plain, "both.example")).addresses == ["192.0.2.1"]
    assert (await answered(plain, "both.example", Type.AAAA)).addresses == ["2001:db8::1"]
    assert names.asked == ["both.example"]
    assert (await answered(plain, "nas")).addresses == ["192.0.2.9"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nowhere.example", Code.NO_SUCH_NAME),
        ("nothing.example", Code.NO_ERROR),
        ("broken.example", Code.SERVER_FAILURE),
        ("127.1", Code.NO_SUCH_NAME),
        ("0x7f000001", Code.NO_SUCH_NAME),
    ],
)
async def test_what_it_does_not_find(plain: Resolver, name: str, code: Code) -> None:
    for kind in (Type.A, Type.AAAA):
        answer = await answered(plain, name, kind)
        assert (answer.ident, answer.code, answer.addresses) == (7, code, [])


async def test_what_this_machine_calls_itself_is_the_host_there(
    nursery: trio.Nursery,
    names: Names,
    files: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Dev.Example")
    names.known |= {"dev.example": ["127.0.0.2", "::1"], "dev": ["127.0.0.2"], "dev.other": ["127.0.0.2"]}
    (tmp_path / "hosts").write_text("127.0.1.1 laptop\n::1 six\n127.0.0.1 localhost\n")
    tested = Resolver(NetworkSettings(), HOST, look_up=names, **files)
    await nursery.start(tested.run)
    for name in ("dev.example", "dev", "laptop", "six"):
        assert (await answered(tested, name)).addresses == [HOST]
        assert (await answered(tested, name, Type.AAAA)).addresses == []
    # But everybody has a localhost of their own, and to DNS loopback is whoever asks, or a code.
    for name, address in (
        ("localhost", "127.0.0.1"),
        ("here.example", "127.0.1.1"),
        ("dev.other", "127.0.0.2"),
    ):
        assert (await answered(tested, name)).addresses == [address]


async def test_addresses_that_mean_something_here_only_are_left_out(plain: Resolver) -> None:
    assert (await answered(plain, "here.example", Type.AAAA)).addresses == ["::1"]


async def test_a_lookup_that_fails_in_a_way_of_its_own_is_one_name_less(
    plain: Resolver, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    names.known["odd.example"] = RuntimeError("can't start new thread")
    assert (await answered(plain, "odd.example")).code == Code.SERVER_FAILURE
    assert "can't start new thread" in caplog.text
    assert (await answered(plain, "both.example")).addresses == ["192.0.2.1"]


async def test_many_addresses_ask_for_a_stream(plain: Resolver) -> None:
    assert (await answered(plain, "many.example")).truncated
    answer = await answered(plain, "many.example", stream=True)
    assert len(answer.addresses) == resolver.MAX_ADDRESSES


async def test_a_hosts_file_counts_at_once(plain: Resolver, names: Names, tmp_path: Path) -> None:
    assert (await answered(plain, "db.test")).code == Code.NO_SUCH_NAME
    (tmp_path / "hosts").write_text("192.0.2.7 db.test\n127.0.0.1 app.test both.example\n")
    assert (await answered(plain, "db.test")).addresses == ["192.0.2.7"]
    assert (await answered(plain, "db.test", Type.AAAA)).code == Code.NO_ERROR
    assert (await answered(plain, "app.test")).addresses == [HOST]
    assert (await answered(plain, "both.example")).addresses == [HOST]
    (tmp_path / "hosts").write_text("\n")
    assert (await answered(plain, "both.example")).addresses == ["192.0.2.1"]
    assert names.asked == ["db.test", "both.example"]


async def test_a_lookup_is_used_again_for_a_moment_only(
    nursery: trio.Nursery, names: Names, files: dict[str, Any], mock_clock: trio.testing.MockClock
) -> None:
    tested = Resolver(NetworkSettings(), HOST, look_up=names, **files)
    await nursery.start(tested.run)
    await answered(tested, "both.example")
    names.known["both.example"] = ["192.0.2.2"]
    assert (await answered(tested, "both.example")).addresses == ["192.0.2.1"]
    mock_clock.jump(FRESH + 0.1)
    assert (await answered(tested, "both.example")).addresses == ["192.0.2.2"]


async def test_a_resolver_that_hangs_costs_each_query_its_time_and_no_more(
    nursery: trio.Nursery, names: Names, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "QUERY_TIME", 0.1)
    monkeypatch.setattr(resolver, "MAX_LOOKUPS", 40)
    assert QUERY_TIME < 5
    tested = Resolver(NetworkSettings(), HOST, look_up=names, **files)
    await nursery.start(tested.run)
    names.held = threading.Event()
    answers: list[Answer] = []

    async def asks(name: str) -> None:
        answers.append(await answered(tested, name))

    async with trio.open_nursery() as clients:
        for number in range(60):
            clients.start_soon(asks, f"{number}.example")
            clients.start_soon(asks, f"{number}.example")
    assert {answer.code for answer in answers} == {Code.SERVER_FAILURE}
    assert len(answers) == 120
    assert len(names.asked) <= resolver.MAX_THREADS
    # What needs nobody is answered meanwhile, and the rest when it is over.
    assert (await answered(tested, "host.docker.internal")).addresses == [HOST]
    names.held.set()
    names.held = None
    with trio.fail_after(10):
        while (await answered(tested, "both.example")).addresses != ["192.0.2.1"]:
            await trio.sleep(0.02)


async def test_other_types_go_to_the_hosts_nameservers(
    plain: Resolver, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await answered(plain, "both.example", 16)).code == Code.SERVER_FAILURE
    async with nameserver(refuses(Code.NO_SUCH_NAME)) as server:

        async def current() -> tuple[Nameserver, ...]:
            await trio.lowlevel.checkpoint()
            return (server,)

        monkeypatch.setattr(plain._resolv_conf, "current", current)
        assert (await answered(plain, "both.example", 16)).code == Code.NO_SUCH_NAME
    assert names.asked == []


async def test_nameservers_of_the_configuration_are_asked_instead_of_the_host(
    nursery: trio.Nursery, names: Names, files: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("192.0.2.7 db.test\n")
    async with nameserver(says("192.0.2.50")) as server:
        tested = Resolver(NetworkSettings(nameservers=(server,)), HOST, look_up=names, **files)
        await nursery.start(tested.run)
        assert (await answered(tested, "both.example")).addresses == ["192.0.2.50"]
        assert (await answered(tested, "db.test")).addresses == ["192.0.2.7"]
        assert (await answered(tested, "host.docker.internal")).addresses == [HOST]
    assert names.asked == []


async def test_names_of_the_configuration(nursery: trio.Nursery, names: Names, files: dict[str, Any]) -> None:
    settings = from_json(
        {
            "hosts": {
                "db.test": "192.0.2.7",
                "both.example": "192.0.2.8",
                "app.test": "127.0.0.1",
                "api.test": "host.docker.internal",
                "alias.test": "nas",
                "one.test": "two.test",
                "two.test": "one.test",
                "host.docker.internal": "192.0.2.66",
            }
        }
    )
    tested = Resolver(settings, HOST, look_up=names, **files)
    await nursery.start(tested.run)
    expected = {
        "db.test": ["192.0.2.7"],
        "both.example": ["192.0.2.8"],
        "app.test": [HOST],
        "api.test": [HOST],
        "alias.test": ["192.0.2.9"],
        "host.docker.internal": [HOST],
    }
    for name, addresses in expected.items():
        assert (await answered(tested, name)).addresses == addresses
    assert (await answered(tested, "one.test")).code == Code.SERVER_FAILURE


async def test_noise(plain: Resolver) -> None:
    assert await plain.answer(b"noise") == b""
    assert (await plain.answer(ask("a", 1)[:-1]))[3] & 0xF == Code.FORMAT_ERROR


# --- the host's own resolver -----------------------------------------------------------------------


def test_what_the_library_is_asked_and_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    outcome: list[Any] = []

    def getaddrinfo(name: bytes, port: object, **options: Any) -> Any:
        asked.append(name)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return [(0, 0, 0, "", (address, 0)) for address in outcome[0]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    outcome[:] = [["192.0.2.1", "192.0.2.1", "2001:db8::1"]]
    assert look_up("a.example") == ["192.0.2.1", "2001:db8::1"]
    # A single label is what search domains are for; anything else means itself.
    look_up("nas")
    assert asked == [b"a.example.", b"nas"]
    outcome[:] = [socket.gaierror(socket.EAI_NODATA, "no address")]
    assert look_up("a.example") == []
    outcome[:] = [socket.gaierror(socket.EAI_NONAME, "no name")]
    with pytest.raises(NoSuchName):
        look_up("a.example")
    for error in (socket.gaierror(socket.EAI_AGAIN, "later"), OSError("x"), UnicodeError("label too long")):
        outcome[:] = [error]
        with pytest.raises(Unanswered):
            look_up("a.example")


def test_this_host_knows_localhost() -> None:
    assert "127.0.0.1" in look_up("localhost")
