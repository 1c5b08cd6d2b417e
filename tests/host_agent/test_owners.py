"""Who listens in the guest, as rows say it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio.testing

from host_agent import owners
from host_agent.forwards import MAX_WORD
from protocol.api import Forward, ForwardState, GetOwners, Owner, Owners, Proto
from protocol.link import Hello, Link, Role, Service

ROW = Forward(Proto.TCP, "0.0.0.0", 80, "localhost", 80, ForwardState.LISTENING, unit="docker.service")
OWNER = Owner(Proto.TCP, "0.0.0.0", 80, "nginx", "web")


def test_a_row_has_the_owner_of_its_socket_and_of_no_other() -> None:
    others = [replace(OWNER, proto=Proto.UDP), replace(OWNER, address="::"), replace(OWNER, port=81)]
    assert owners.named([ROW], others) == [ROW]
    assert owners.named([ROW], [*others, OWNER]) == [replace(ROW, process="nginx", container="web")]


def test_words_of_the_guest_are_cut() -> None:
    (row,) = owners.named([ROW], [replace(OWNER, process="x" * 100_000, container="ü" * 100_000)])
    assert (len(row.process), len(row.container)) == (MAX_WORD, MAX_WORD)
    assert row.container.isascii()


async def asked(service: Service) -> list[Owner]:
    ours, theirs = trio.testing.memory_stream_pair()
    host = Link(ours, Role.HOST, Service(), Hello(name="host"))
    guest = Link(theirs, Role.GUEST, service, Hello(name="guest"))
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            starting.start_soon(nursery.start, host.run)
            starting.start_soon(nursery.start, guest.run)
        answer = await owners.ask(host)
        nursery.cancel_scope.cancel()
    return answer


async def test_the_guest_is_asked() -> None:
    async def answer(request: GetOwners) -> Owners:
        await trio.lowlevel.checkpoint()
        return Owners([OWNER])

    service = Service()
    service.on_request(GetOwners, answer)
    assert await asked(service) == [OWNER]


async def test_rows_do_without_a_guest_that_does_not_say(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang(request: GetOwners) -> Owners:
        await trio.sleep_forever()
        return Owners([])

    service = Service()
    service.on_request(GetOwners, hang)
    assert await owners.ask(None) == []
    assert await asked(Service()) == []
    assert await asked(service) == []
