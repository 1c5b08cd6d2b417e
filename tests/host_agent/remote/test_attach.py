"""What ``attach`` does between its own login and the host agent's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from host_agent.errors import UserError
from host_agent.paths import Home
from host_agent.remote.attach import Attempt, Ways, Wishes
from host_agent.remote.prompts import Asked
from host_agent.remote.record import Attached
from host_agent.remote.way import Way

PASSWORD, CODE = "me@box asks: Password:", "me@box asks: Verification code:"


class Person:
    """Has answered what the first login asked; then says these, one after another."""

    def __init__(self, answers: dict[str, str], next_ones: list[str]) -> None:
        self.answers = answers
        self._next = next_ones

    def ask(self, question: str, *, secret: bool) -> str | None:
        if not self._next:
            return None
        self.answers[question] = self._next.pop(0)
        return self.answers[question]

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        return False


@asynccontextmanager
async def no_way(attached: Attached, asked: Asked) -> AsyncIterator[Way]:
    raise AssertionError("nobody goes there")
    yield


def attempt(home: Home, person: Person, said: list[str]) -> Attempt:
    ways = Ways(no_way, lambda *_: pytest.fail("nothing is brought there"))
    return Attempt(home.instance("box"), "me@box", Wishes(), said.append, ways, person)


def test_a_password_is_typed_once(home: Home) -> None:
    person, said = Person({PASSWORD: "right"}, ["never"]), list[str]()
    assert attempt(home, person, said)._asked_again() == ()
    assert (person.answers, said) == ({PASSWORD: "right"}, [])


def test_a_code_is_asked_for_again_for_the_connection_that_stays(home: Home) -> None:
    person, said = Person({PASSWORD: "right", CODE: "111"}, ["222"]), list[str]()
    (warning,) = attempt(home, person, said)._asked_again()
    assert "agentctl attach box" in warning
    assert person.answers == {PASSWORD: "right", CODE: "222"}
    assert len(said) == 1


def test_who_does_not_give_a_second_code_is_not_attached(home: Home) -> None:
    with pytest.raises(UserError, match="was not answered"):
        attempt(home, Person({CODE: "111"}, []), [])._asked_again()
