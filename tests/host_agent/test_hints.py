"""Who types what a hint says does it to the instance that the hint is about."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from host_agent import hints
from host_agent.commands.places import OF_NO_INSTANCE, PLACES
from host_agent.paths import DEFAULT_INSTANCE


@pytest.fixture
def about() -> Iterator[None]:
    hints.choose("dev")
    yield
    hints.choose(DEFAULT_INSTANCE)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("start it: agentctl up", "start it: agentctl --instance dev up"),
        ("agentctl stop && agentctl up", "agentctl --instance dev stop && agentctl --instance dev up"),
        ('eval "$(agentctl env)"', 'eval "$(agentctl --instance dev env)"'),
        ("agentctl ssh-config", "agentctl --instance dev ssh-config"),
        ("agentctl list", "agentctl list"),
        ("docker context agentctl is active", "docker context agentctl is active"),
        ("an error of agentctl's", "an error of agentctl's"),
        ("an agentctl of another version", "an agentctl of another version"),
        ("agentctl upset", "agentctl upset"),
        ("agentctl --instance dev up", "agentctl --instance dev up"),
    ],
)
def test_commands_in_a_hint_are_those_of_the_instance(about: None, text: str, shown: str) -> None:
    assert hints.addressed(text) == shown


def test_the_default_instance_needs_no_name() -> None:
    assert hints.addressed("agentctl up") == "agentctl up"


def test_all_commands_are_about_an_instance_but_those_that_say_so(about: None) -> None:
    for command in PLACES:
        named = f"agentctl {command}" if command in OF_NO_INSTANCE else f"agentctl --instance dev {command}"
        assert hints.addressed(f"see: agentctl {command}") == f"see: {named}"
    assert PLACES.keys() >= OF_NO_INSTANCE
