"""When a line is tried again; ``tests/remote`` has those that stand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from host_agent.remote import connection, ssh_line
from host_agent.remote.failures import Refused, Unreachable
from host_agent.remote.machine import Address
from host_agent.remote.ssh_line import SshLine
from host_agent.remote.way import Condition

PATIENCE = 60.0


def conditions(
    monkeypatch: pytest.MonkeyPatch, *attempts: Callable[[SshLine], Awaitable[None]]
) -> list[Condition]:
    """What a line is, one after another, whose attempts to connect are these; no other follows the last one."""
    told: list[Condition] = []
    left = list(attempts)

    async def attempt(*_: object, **__: object) -> None:
        await left.pop(0)(line)

    async def go() -> None:
        nonlocal line
        line = SshLine(Address("box"), None, told.append)
        async with asyncio.timeout(PATIENCE):
            await line.keep()

    line: SshLine
    monkeypatch.setattr(connection, "connect", attempt)
    asyncio.run(go())
    assert left == []
    return told


async def refused(_: SshLine) -> None:
    raise Refused("never")


async def failed(_: SshLine) -> None:
    raise Unreachable("not now")


async def a_bug(_: SshLine) -> None:
    raise KeyError("a bug\x1b[2J")


async def hurried(line: SshLine) -> None:
    line.hurry()
    raise Unreachable("not now")


def test_it_is_tried_until_that_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_line, "FIRST_PAUSE", 0.01)
    told = conditions(monkeypatch, failed, failed, refused)
    assert [(each.reason, each.final, each.attempts) for each in told] == [
        ("not now", False, 1),
        ("not now", False, 2),
        ("never", True, 3),
    ]


def test_a_bug_is_not_the_end_of_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_line, "FIRST_PAUSE", 0.01)
    told = conditions(monkeypatch, a_bug, refused)
    assert told[0].reason == "The connection to box failed: 'a bug\\x1b[2J'."
    assert not told[0].final


def test_who_hurries_while_an_attempt_fails_has_another_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_line, "FIRST_PAUSE", 2 * PATIENCE)
    assert len(conditions(monkeypatch, hurried, refused)) == 2
