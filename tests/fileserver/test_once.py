"""One question, one answer, one deed."""

from __future__ import annotations

import pytest

from fileserver.ledger import MAX_OUTCOMES, Answer, Intent, Ledger
from fileserver.once import Glimpses, Once, Verdict, digest
from protocol.files import ListEntries, Lookup

KEY = (7, 100)
DONE = Answer(1, 0, [])


def test_whatever_a_frame_may_say_has_a_digest() -> None:
    assert digest(4, [1, "\udcff"], b"") != digest(4, [1, "\udcfe"], b""), (
        "msgpack's way with bytes that are no UTF-8"
    )


def test_the_same_question_gets_the_same_answer() -> None:
    once: Once[str] = Once()
    assert once.ask(KEY, 1, "first") is Verdict.DO
    assert once.done(KEY, DONE) == ["first"]
    assert once.ask(KEY, 1, "again") == DONE
    assert once.ask(KEY, 1, "and again") == DONE


def test_a_failure_is_an_answer() -> None:
    once: Once[str] = Once()
    once.ask(KEY, 1, "first")
    once.done(KEY, Answer(1, 17))
    assert once.ask(KEY, 1, "again") == Answer(1, 17)


def test_who_asks_meanwhile_waits_for_the_first() -> None:
    once: Once[str] = Once()
    once.ask(KEY, 1, "first")
    assert once.ask(KEY, 1, "second") is Verdict.WAIT
    assert once.ask(KEY, 1, "third") is Verdict.WAIT
    assert once.ask((8, 100), 1, "another share") is Verdict.DO
    assert once.done(KEY, DONE) == ["first", "second", "third"]


def test_another_content_is_another_call() -> None:
    """A share that is mounted again numbers its requests anew."""
    once: Once[str] = Once()
    once.ask(KEY, 1, "old")
    assert once.ask(KEY, 2, "new") is Verdict.APART
    once.done(KEY, DONE)
    assert once.ask(KEY, 2, "new") is Verdict.DO
    once.done(KEY, Answer(2, 0, []))
    assert once.ask(KEY, 2, "new") == Answer(2, 0, [])


def test_what_a_killed_server_began_is_judged_once() -> None:
    past = Ledger()
    past.intents.remember(KEY, Intent(1, b"before"))
    past.outcomes.remember((7, 101), DONE)
    once: Once[str] = Once(past)
    assert once.ask((7, 101), 1, "") == DONE
    assert once.ask(KEY, 1, "") is Verdict.DO
    assert once.begun(KEY, 1) == b"before"
    assert once.begun(KEY, 1) is None


def test_an_intent_of_another_call_is_not_believed() -> None:
    past = Ledger()
    past.intents.remember(KEY, Intent(1, b"before"))
    assert Once(past).begun(KEY, 2) is None


def test_the_cache_is_bounded() -> None:
    once: Once[int] = Once()
    for unique in range(MAX_OUTCOMES + 1):
        once.ask((7, unique), 1, 0)
        once.done((7, unique), DONE)
    assert once.ask((7, 0), 1, 0) is Verdict.DO
    assert once.ask((7, 1), 1, 0) == DONE


def test_a_share_that_is_dropped_takes_its_outcomes_along() -> None:
    once: Once[str] = Once()
    for key in (KEY, (8, 100)):
        once.ask(key, 1, "")
        once.done(key, DONE)
    once.drop(7)
    assert once.ask(KEY, 1, "") is Verdict.DO
    assert once.ask((8, 100), 1, "") == DONE


def test_a_digest_tells_contents_apart() -> None:
    seen = {
        digest(31, [7, 100, 2, 0], b"abc"),
        digest(31, [7, 100, 2, 0], b"abd"),
        digest(31, [7, 100, 2, 1], b"abc"),
        digest(30, [7, 100, 2, 0], b"abc"),
        digest(31, [7, 100, 2, 0], b"abc" + bytes(8192)),
        digest(31, [7, 100, 2, 0], b"abc" + bytes(8193)),
    }
    assert len(seen) == 6
    assert digest(31, [7, 100, 2, 0], b"abc") in seen


@pytest.mark.parametrize(
    ("call", "other"),
    [
        (Lookup(7, 100, 1, b"a"), Lookup(7, 100, 1, b"b")),
        (ListEntries(7, 100, 1, 0), ListEntries(7, 100, 1, 5)),
        (ListEntries(7, 100, 1, 0), Lookup(7, 100, 1, b"a")),
    ],
)
def test_a_lookup_asked_again_gives_back_what_the_first_counted(
    call: Lookup | ListEntries, other: Lookup | ListEntries
) -> None:
    glimpses = Glimpses()
    glimpses.remember(call, [5, 6])
    assert glimpses.take(other) == (), "another question"
    glimpses.remember(call, [5, 6])
    assert glimpses.take(call) == [5, 6]
    assert glimpses.take(call) == (), "and only once"
