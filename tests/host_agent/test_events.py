from __future__ import annotations

import logging

import pytest

from host_agent import events
from host_agent.events import EventLog
from protocol.api import Event


def test_an_event_is_stamped_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = EventLog(clock=lambda: 12.5)
    heard: list[Event] = []
    assert log.subscribe(heard.append) == []
    log.say("stage", "booting the VM", stage="booting")
    assert heard == [Event(12.5, "stage", "booting the VM", {"stage": "booting"})]
    assert caplog.messages == ["stage: booting the VM stage=booting"]


def test_who_comes_late_is_told_what_was_and_then_what_comes() -> None:
    log = EventLog(clock=lambda: 0.0)
    log.say("a", "first")
    heard: list[Event] = []
    before = log.subscribe(heard.append)
    log.say("b", "second")
    assert [event.kind for event in before] == ["a"]
    assert [event.kind for event in heard] == ["b"]


def test_who_comes_after_another_start_is_told_only_of_that() -> None:
    log = EventLog()
    heard: list[str] = []
    log.subscribe(lambda event: heard.append(event.kind))
    log.say("a", "first")
    log.begin()
    log.say("b", "second")
    assert [event.kind for event in log.subscribe(lambda event: None)] == ["b"]
    assert heard == ["a", "b"]


def test_nobody_is_called_after_unsubscribing_not_even_within_a_call() -> None:
    log = EventLog()
    heard: list[str] = []

    def once(event: Event) -> None:
        heard.append(event.kind)
        log.unsubscribe(once)

    log.subscribe(once)
    log.subscribe(lambda event: heard.append("other " + event.kind))
    log.say("a", "")
    log.say("b", "")
    log.unsubscribe(once)
    assert heard == ["a", "other a", "other b"]


def test_memory_is_bounded_and_keeps_the_newest() -> None:
    log = EventLog()
    for number in range(events.MAX_REMEMBERED + 10):
        log.say(str(number), "")
    remembered = log.subscribe(lambda event: None)
    assert len(remembered) == events.MAX_REMEMBERED
    assert remembered[-1].kind == str(events.MAX_REMEMBERED + 9)
