"""Sockets of the guest that lead to the host, with a real link; the host is made up."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from guest_agent import entrances
from guest_agent.entrances import MAX_ENTRANCES, MAX_UNIX_PATH, Entrances
from guest_agent.spawn import Account
from protocol.api import DialHost, OpenHostEntrances
from protocol.errors import ErrorCode, LinkClosed, RpcError
from protocol.link import Hello, Incoming, Link, Role, Service

ME = Account("me", os.geteuid(), os.getegid(), (), "/", "/bin/sh")


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="ac-"))
    yield path
    shutil.rmtree(path)


@dataclass
class Guest:
    entrances: Entrances
    asked: list[str] = field(default_factory=list)
    refuse: bool = False

    async def serve(self, target: DialHost, incoming: Incoming) -> None:
        """What the host has behind each entrance: something that says its name, then everything again."""
        self.asked.append(target.entrance)
        if self.refuse:
            await incoming.refuse(ErrorCode.DENIED, "no rule leads there")
            return
        stream = await incoming.accept()
        await stream.send_all(f"the {Path(target.entrance).name}:".encode())
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Link]:
        """The host's end of a session."""
        host_end, guest_end = trio.testing.memory_stream_pair()
        ours, theirs = Service(), Service()
        theirs.on_stream(DialHost, self.serve)
        self.entrances.register(ours)
        host = Link(host_end, Role.HOST, theirs, Hello(name="host"))
        guest = Link(guest_end, Role.GUEST, ours, Hello(name="guest"))
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                starting.start_soon(nursery.start, guest.run)
                starting.start_soon(nursery.start, host.run)
            with self.entrances.session(guest):
                yield host
            with suppress(LinkClosed):
                await host.goodbye()


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    """In the end no descriptor is left."""
    before = set(os.listdir("/dev/fd"))
    guest = Guest(Entrances(lambda: ME))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(guest.entrances.run)
            yield guest
            nursery.cancel_scope.cancel()
    assert not set(os.listdir("/dev/fd")) - before


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def asked_through(client: trio.SocketStream, question: bytes) -> bytes:
    async with client:
        await client.send_all(question)
        await client.send_eof()
        return await everything(client)


def unix(folder: Path, name: str = "s") -> str:
    return str(folder / name)


async def opened(host: Link, *wanted: str) -> dict[str, str]:
    return (await host.request(OpenHostEntrances(list(wanted)))).reasons


async def test_a_socket_leads_to_the_host(guest: Guest, folder: Path) -> None:
    entrance = unix(folder)
    async with guest.session() as host:
        assert await opened(host, entrance) == {}
        payload = os.urandom(1_000_000)
        answers: list[bytes] = []

        async def ask() -> None:
            client = await trio.open_unix_socket(entrance)
            async with client, trio.open_nursery() as nursery:

                async def send() -> None:
                    await client.send_all(payload)
                    await client.send_eof()

                nursery.start_soon(send)
                answers.append(await everything(client))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert answers == [b"the s:" + payload] * 3


async def test_the_socket_is_the_users_and_nobody_elses(folder: Path) -> None:
    account = Account("u", 12345, 23456, (), "/", "/bin/sh") if os.geteuid() == 0 else ME
    entrance = unix(folder / "made" / "for it")
    outside = Entrances(lambda: account)
    async with trio.open_nursery() as nursery:
        await nursery.start(outside.run)
        assert (await outside.replace(OpenHostEntrances([entrance]))).reasons == {}
        status = os.stat(entrance)
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert (status.st_uid, status.st_gid) == (account.uid, account.gid)
        made = os.stat(folder / "made")
        assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (os.stat(folder).st_uid, 0o755)
        assert os.listdir(folder / "made" / "for it") == ["s"]
        nursery.cancel_scope.cancel()


async def test_the_list_is_replaced_as_a_whole(guest: Guest, folder: Path) -> None:
    stays, goes, comes = (unix(folder, name) for name in ("stays", "goes", "comes"))
    async with guest.session() as host:
        await opened(host, stays, goes)
        before = os.stat(stays).st_ino
        async with await trio.open_unix_socket(goes) as client:
            assert await client.receive_some() == b"the goes:"
            await opened(host, stays, comes)
            assert sorted(os.listdir(folder)) == ["comes", "stays"]
            assert os.stat(stays).st_ino == before, "what stays is not opened again"
            await client.send_all(b"still here")  # what is connected ends by itself
            assert await client.receive_some() == b"still here"
        assert await opened(host) == {}
        assert os.listdir(folder) == []


async def test_one_that_somebody_has_removed_is_made_again(guest: Guest, folder: Path) -> None:
    entrance = unix(folder)
    async with guest.session() as host:
        await opened(host, entrance)
        os.unlink(entrance)
        await opened(host, entrance)
        assert await asked_through(await trio.open_unix_socket(entrance), b"x") == b"the s:x"


async def test_a_name_that_is_somebody_elses_now_is_left_alone(guest: Guest, folder: Path) -> None:
    entrance = unix(folder)
    async with guest.session() as host:
        await opened(host, entrance)
        os.unlink(entrance)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(entrance)
            await opened(host)
            assert os.listdir(folder) == ["s"]


async def test_a_stale_socket_is_replaced(guest: Guest, folder: Path) -> None:
    entrance = unix(folder)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(entrance)
    async with guest.session() as host:
        assert await opened(host, entrance) == {}
        assert await asked_through(await trio.open_unix_socket(entrance), b"x") == b"the s:x"


async def test_what_cannot_be_opened_is_told_and_the_others_are_open(guest: Guest, folder: Path) -> None:
    (folder / "file").write_text("")
    long = str(folder / ("x" * 120))
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(folder / "used"))
        used.listen()
        async with guest.session() as host:
            wanted = [*(unix(folder, name) for name in ("file", "used", "file/x")), long, "relative", "/a\0b"]
            assert await opened(host, *wanted, unix(folder, "good")) == {
                f"{folder}/file": f"{folder}/file exists and is not a socket",
                f"{folder}/used": f"another process listens at {folder}/used",
                f"{folder}/file/x": "Not a directory",
                long: f"its path is too long: {len(long)} bytes, of which the system allows 107",
                "relative": "the path of a socket is absolute",
                "/a\0b": "the path of a socket is absolute",
            }
            assert await asked_through(await trio.open_unix_socket(str(folder / "good")), b"") == b"the good:"
            assert sorted(os.listdir(folder)) == ["file", "good", "used"]


async def test_a_list_that_is_too_long_changes_nothing(guest: Guest, folder: Path) -> None:
    async with guest.session() as host:
        await opened(host, unix(folder))
        with pytest.raises(RpcError) as caught:
            await opened(host, *(unix(folder, str(number)) for number in range(MAX_ENTRANCES + 1)))
        assert caught.value.code is ErrorCode.LIMIT
        assert os.listdir(folder) == ["s"]


async def test_a_client_that_the_host_refuses_is_hung_up_on(guest: Guest, folder: Path) -> None:
    entrance, guest.refuse = unix(folder), True
    async with guest.session() as host:
        await opened(host, entrance)
        async with await trio.open_unix_socket(entrance) as client:
            assert await client.receive_some() == b""
    assert guest.asked == [entrance]


async def test_clients_wait_for_the_next_session(guest: Guest, folder: Path) -> None:
    entrance = unix(folder)
    async with guest.session() as host:
        await opened(host, entrance)
        client = await trio.open_unix_socket(entrance)
        assert await client.receive_some() == b"the s:"
    async with client:  # of the session that is over
        with suppress(trio.BrokenResourceError):
            assert await client.receive_some() == b""
    async with trio.open_nursery() as nursery:
        answers: list[bytes] = []

        async def ask() -> None:
            answers.append(await asked_through(await trio.open_unix_socket(entrance), b"x"))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with guest.session():
            while not answers:
                await trio.sleep(0.005)
    assert answers == [b"the s:x"]


async def test_a_client_does_not_wait_for_ever(
    guest: Guest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entrances, "PATIENCE", 0.05)
    async with guest.session() as host:
        await opened(host, unix(folder))
    async with await trio.open_unix_socket(str(folder / "s")) as client:
        assert await client.receive_some() == b""
    assert guest.asked == []


async def test_a_client_that_has_gone_leaves_its_place_to_who_comes(
    guest: Guest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ssh that is tried again and again while there is no session must not use up all places."""
    monkeypatch.setattr(entrances, "LOOK", 0.01)
    guest.entrances._slots = trio.Semaphore(4)  # one is for who comes next
    entrance = unix(folder)
    async with guest.session() as host:
        await opened(host, entrance)
    said, asking = await trio.open_unix_socket(entrance), await trio.open_unix_socket(entrance)
    await said.send_all(b"said")
    await said.aclose()
    await asking.send_eof()  # and waits for the answer
    for _ in range(5):
        await (await trio.open_unix_socket(entrance)).aclose()
    with trio.fail_after(5):
        while guest.entrances._slots.value != 1:
            await trio.sleep(0.01)
    await trio.sleep(0.05)
    assert guest.entrances._slots.value == 1, "two are still to be carried"
    async with guest.session(), asking:
        assert await everything(asking) == b"the s:"
    assert len(guest.asked) == 2


async def test_a_short_name_at_the_end_of_a_long_path(guest: Guest, folder: Path) -> None:
    """The name that the socket has at first, .PID, is longer."""
    deep = folder / ("d" * (MAX_UNIX_PATH - len(os.fsencode(folder)) - len("//s")))
    async with guest.session() as host:
        assert await opened(host, unix(deep)) == {}
        assert len(unix(deep)) == MAX_UNIX_PATH
        async with await trio.open_unix_socket(unix(deep)) as client:
            assert await asked_through(client, b"question") == b"the s:question"
        assert os.listdir(deep) == ["s"]


async def test_a_reason_that_stays_is_logged_once(
    guest: Guest, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").write_text("")
    with caplog.at_level(logging.INFO):
        async with guest.session() as host:
            for _ in range(3):
                assert await opened(host, unix(folder, "file")) != {}
    assert caplog.text.count("entrance.failed") == 1


async def test_the_end_of_the_agent_removes_them(folder: Path) -> None:
    ending = Entrances(lambda: ME)
    async with trio.open_nursery() as nursery:
        await nursery.start(ending.run)
        await ending.replace(OpenHostEntrances([unix(folder)]))
        assert os.listdir(folder) == ["s"]
        nursery.cancel_scope.cancel()
    assert os.listdir(folder) == []


async def test_without_the_user_there_is_no_socket(folder: Path) -> None:
    def nobody() -> Account:
        raise KeyError("getpwnam(): name not found: 'u'")

    without = Entrances(nobody)
    async with trio.open_nursery() as nursery:
        await nursery.start(without.run)
        answer = await without.replace(OpenHostEntrances([unix(folder)]))
        assert answer.reasons == {unix(folder): "getpwnam(): name not found: 'u'"}
        nursery.cancel_scope.cancel()
