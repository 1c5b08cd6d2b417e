from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import forwarders, socket_forwards
from host_agent.cleanup import clean_up
from host_agent.configuration import config
from host_agent.errors import UserError
from host_agent.forwarders import Connections
from host_agent.paths import InstancePaths
from host_agent.reverse import WAITING
from host_agent.socket_forwards import SocketForwards
from host_agent.unix_listening import listen_unix
from protocol.api import (
    ChangeSocketForwards,
    DialUnix,
    ForwardState,
    HostEntrances,
    OpenHostEntrances,
    PortRule,
    SocketForward,
    SocketRow,
    Target,
)


@dataclass
class Host:
    """The list that is kept, and a guest whose sockets say their path."""

    forwards: SocketForwards
    kept: list[tuple[SocketForward, ...]] = field(default_factory=list)
    full_disk: bool = False

    async def dial(self, target: Target) -> trio.abc.HalfCloseableStream:
        assert isinstance(target, DialUnix)
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(target.path.encode())
        await theirs.send_eof()
        return ours

    def remember(self, sockets: tuple[SocketForward, ...]) -> None:
        if self.full_disk:
            raise OSError(28, "No space left on device")
        self.kept.append(sockets)


@asynccontextmanager
async def running(*forwards: SocketForward, carried: Connections | None = None) -> AsyncIterator[Host]:
    host: Host = Host(
        SocketForwards(forwards, lambda target: host.dial(target), lambda s: host.remember(s), carried)
    )
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(host.forwards.run)
            yield host
            nursery.cancel_scope.cancel()


async def heard(path: Path) -> bytes:
    async with await trio.open_unix_socket(str(path)) as client:
        return b"".join([bytes(data) async for data in client])


async def test_a_socket_of_the_guest_is_on_the_host(folder: Path) -> None:
    async with running(SocketForward("/run/g", str(folder / "s"))) as host:
        assert await heard(folder / "s") == b"/run/g"
        [row] = (await host.forwards.report()).rows
        assert row == SocketRow(row.forward, ForwardState.LISTENING)
    assert os.listdir(folder) == []


async def test_sockets_share_their_places_with_ports(folder: Path) -> None:
    """So that they do not take the streams that Docker and shells need."""
    carried = Connections()
    carried.places = trio.Semaphore(1)
    forwards = [SocketForward(f"/{name}", str(folder / name)) for name in "ab"]
    async with running(*forwards, carried=carried):
        carried.places.acquire_nowait()
        heard_from: list[bytes] = []

        async def listen(name: str) -> None:
            heard_from.append(await heard(folder / name))

        async with trio.open_nursery() as nursery:
            for name in "ab":
                nursery.start_soon(listen, name)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert heard_from == []
            carried.places.release()
        assert sorted(heard_from) == [b"/a", b"/b"]


async def test_the_list_is_changed_and_kept(folder: Path) -> None:
    old, new = SocketForward("/old", str(folder / "o")), SocketForward("/new", str(folder / "n"))
    async with running(old) as host:
        rows = (await host.forwards.change(ChangeSocketForwards(add=[new, old], remove=[]))).rows
        assert rows == [SocketRow(old, ForwardState.LISTENING), SocketRow(new, ForwardState.LISTENING)]
        assert await heard(folder / "n") == b"/new"
        rows = (await host.forwards.change(ChangeSocketForwards(remove=[old]))).rows
        assert rows == [SocketRow(new, ForwardState.LISTENING)]
        assert os.listdir(folder) == ["n"]
        assert host.kept == [(old, new), (new,)]


async def test_who_asked_may_leave_and_what_is_on_the_list_is_there(folder: Path) -> None:
    """A ^C of `forward add` while the guest does not answer."""
    old, new = SocketForward("/old", str(folder / "o")), SocketForward("/new", str(folder / "n"))
    async with running(old) as host:
        remember = host.remember

        def remember_and_leave(sockets: tuple[SocketForward, ...]) -> None:
            remember(sockets)
            scope.cancel()

        host.remember = remember_and_leave  # type: ignore[method-assign]
        with trio.CancelScope() as scope:
            await host.forwards.change(ChangeSocketForwards(add=[new], remove=[old]))
        assert host.kept == [(new,)]
        assert (await host.forwards.report()).rows == [SocketRow(new, ForwardState.LISTENING)]
        assert os.listdir(folder) == ["n"]


async def test_one_place_can_lead_elsewhere_at_once(folder: Path) -> None:
    old, new = SocketForward("/old", str(folder / "s")), SocketForward("/new", str(folder / "s"))
    async with running(old) as host:
        rows = (await host.forwards.change(ChangeSocketForwards([new], [old]))).rows
        assert rows == [SocketRow(new, ForwardState.LISTENING)]
        assert await heard(folder / "s") == b"/new"


async def test_what_cannot_be_changes_nothing(folder: Path) -> None:
    one = SocketForward("/g", str(folder / "s"))
    async with running(one) as host:
        for change in (
            ChangeSocketForwards(add=[SocketForward("/other", str(folder / "s"))]),
            ChangeSocketForwards(add=[SocketForward("relative", "/h")]),
            ChangeSocketForwards(remove=[SocketForward("/other", "/h")]),
        ):
            with pytest.raises(UserError):
                await host.forwards.change(change)
        host.full_disk = True
        with pytest.raises(OSError):
            await host.forwards.change(ChangeSocketForwards(remove=[one]))
        assert (await host.forwards.report()).rows == [SocketRow(one, ForwardState.LISTENING)]
        assert await heard(folder / "s") == b"/g"
    assert host.kept == []


async def test_a_place_that_is_taken_is_said_and_taken_once_it_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_forwards, "RETRY", 0.01)
    path = folder / "s"
    other = listen_unix(path)
    one = SocketForward("/g", str(path))
    async with running(one) as host:
        [row] = (await host.forwards.report()).rows
        assert row == SocketRow(one, ForwardState.CONFLICT, f"another process listens on {path}")
        await other.aclose()
        rows = [row]
        while rows[0].state is not ForwardState.LISTENING:
            await trio.sleep(0.005)
            rows = (await host.forwards.report()).rows
        assert await heard(path) == b"/g"


async def test_a_name_that_is_taken_away_is_had_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("LOOK", "RETRY"):
        monkeypatch.setattr(forwarders, constant, 0.01)
    path = folder / "s"
    one = SocketForward("/g", str(path))
    async with running(one) as host:
        path.unlink()
        other = listen_unix(path)
        while (row := (await host.forwards.report()).rows[0]).state is ForwardState.LISTENING:
            await trio.sleep(0.005)
        assert row == SocketRow(one, ForwardState.CONFLICT, f"another process listens on {path}")
        path.unlink()
        await other.aclose()
        while (await host.forwards.report()).rows[0].state is not ForwardState.LISTENING:
            await trio.sleep(0.005)
        assert await heard(path) == b"/g"


async def test_a_folder_that_is_not_there_is_said(folder: Path) -> None:
    async with running(SocketForward("/g", str(folder / "none" / "s"))) as host:
        [row] = (await host.forwards.report()).rows
        assert (row.state, row.reason) == (ForwardState.PENDING, "No such file or directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do that")
async def test_a_folder_that_is_somebody_elses_is_said(folder: Path) -> None:
    os.chmod(folder, 0o500)
    async with running(SocketForward("/g", str(folder / "s"))) as host:
        [row] = (await host.forwards.report()).rows
        assert (row.state, row.reason) == (ForwardState.DENIED, "Permission denied")
    os.chmod(folder, 0o700)


def test_what_a_killed_host_agent_left_is_removed_and_nothing_else(
    folder: Path, instance: InstancePaths
) -> None:
    paths = {name: folder / name for name in ("stale", "used", "file", "none", "reverse", "port")}
    for name in ("stale", "reverse", "port"):
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(paths[name]))
    paths["file"].write_text("")
    names = ("stale", "used", "file", "none", "reverse")
    forwards = tuple(SocketForward(f"/{name}", str(paths[name]), name == "reverse") for name in names)
    rule = PortRule(guest_port=80, ports=1, host_socket=str(paths["port"]))
    default = config.InstanceConfig.default(config.Host.measure())
    config.save(instance, replace(default, sockets=forwards, rules=(rule,)))
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(paths["used"]))
        used.listen()
        clean_up(instance)
    assert sorted(os.listdir(folder)) == ["file", "reverse", "used"]


async def test_who_gives_up_on_a_guest_that_does_not_answer_has_it_told_all_the_same(folder: Path) -> None:
    one = SocketForward("/g", str(folder / "s"), reverse=True)
    asked = trio.Event()
    told: list[list[str]] = []

    class Guest:
        """The link to one that takes its time."""

        async def request(self, message: OpenHostEntrances) -> HostEntrances:
            told.append(message.paths)
            await asked.wait()
            return HostEntrances()

    async with running() as host:
        host.forwards.link_up(Guest())  # type: ignore[arg-type]
        await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.move_on_after(0.05) as impatient:
            await host.forwards.change(ChangeSocketForwards(add=[one]))
        assert impatient.cancelled_caught
        assert (await host.forwards.report()).rows == [SocketRow(one, ForwardState.PENDING, WAITING)]
        asked.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert told == [[], ["/g"]]
        assert (await host.forwards.report()).rows == [SocketRow(one, ForwardState.LISTENING)]


async def test_reverse_waits_for_the_guest_and_opens_nothing_here(folder: Path) -> None:
    one = SocketForward("/g", str(folder / "s"), reverse=True)
    async with running() as host:
        rows = (await host.forwards.change(ChangeSocketForwards(add=[one]))).rows
        assert rows == [SocketRow(one, ForwardState.PENDING, WAITING)]
        assert os.listdir(folder) == []


async def test_agentctls_own_are_in_the_guest_and_on_no_list(folder: Path) -> None:
    own, mine = (SocketForward(path, f"/h{path}", reverse=True) for path in ("/own", "/mine"))
    told: list[list[str]] = []

    class Guest:
        async def request(self, message: OpenHostEntrances) -> HostEntrances:
            await trio.lowlevel.checkpoint()
            told.append(sorted(message.paths))
            return HostEntrances()

    async with running() as host:
        await host.forwards.link_up(Guest()).wait()  # type: ignore[arg-type]
        await host.forwards.use_own([own])
        rows = (await host.forwards.change(ChangeSocketForwards(add=[mine]))).rows
        assert [row.forward for row in rows] == [mine]
        await host.forwards.change(ChangeSocketForwards(remove=[mine]))
        await host.forwards.use_own([])
        assert (await host.forwards.report()).rows == []
        assert host.kept == [(mine,), ()]
    assert [*dict.fromkeys(map(tuple, told))] == [(), ("/own",), ("/mine", "/own")]
    assert told[-1] == []
