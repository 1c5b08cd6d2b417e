from __future__ import annotations

from typing import Any

import pytest

from protocol import messages
from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.frames import Frame, FrameDecoder

ONE_OF_EACH: list[messages.AnyFrame] = [
    messages.Hello(1, 2, "d1g357", "boot", ["a", "b"], "host"),
    messages.Ping(1),
    messages.Pong(1),
    messages.Request(2, "status", [1, "x"], 1.5),
    messages.Reply(2, [True]),
    messages.Failure(2, "limit", "too much", "less"),
    messages.Cancel(2),
    messages.Notify("event", []),
    messages.Open(1, "tcp", ["::1", 80], 1024),
    messages.Opened(1, 2048),
    messages.Refused(1, "refused", "nobody listens", ""),
    messages.Data(1, b"\x00\xff"),
    messages.Credit(1, 512),
    messages.Eof(1),
    messages.Reset(1, "reset", "by peer"),
    messages.Goodbye("gone", "bye"),
]


def through_the_wire(frame: messages.AnyFrame) -> messages.AnyFrame:
    decoder = FrameDecoder()
    decoder.receive_data(b"".join(messages.encode(frame)))
    raw = decoder.next_frame()
    assert raw is not None
    return messages.decode(raw)


@pytest.mark.parametrize("frame", ONE_OF_EACH, ids=lambda frame: type(frame).__name__)
def test_every_frame_comes_back(frame: messages.AnyFrame) -> None:
    assert through_the_wire(frame) == frame


def test_there_is_one_of_each() -> None:
    assert [type(frame) for frame in ONE_OF_EACH] == list(messages.TYPES.values())


@pytest.mark.parametrize("header", [[], {}, 1, None, "x", [0], [17], [-1], ["1"], [None], [True], [1.0]])
def test_an_unknown_type_is_the_peers_error(header: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode(Frame(header, b""))


@pytest.mark.parametrize("header", [[2], [2, "x"], [4, 1, "m"], [9, 1, "k", []], [16, 1, 2]])
def test_a_wrong_shape_is_the_peers_error(header: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode(Frame(header, b""))


def test_only_data_has_a_payload() -> None:
    with pytest.raises(RemoteProtocolError, match="Ping: a payload"):
        messages.decode(Frame([2, 1], b"x"))


def test_the_payload_of_data_is_not_taken_from_its_header() -> None:
    assert messages.decode(Frame([12, 1, b"header"], b"payload")) == messages.Data(1, b"payload")


def test_a_strangers_hello_is_judged_by_its_major_alone() -> None:
    stranger = Frame([1, 9, {"a shape": "from the future"}], b"")
    with pytest.raises(RemoteProtocolError, match="version 9 of the protocol, this side version 1") as caught:
        messages.check_major(stranger, 1)
    assert caught.value.code is ErrorCode.VERSION
    messages.check_major(Frame([2, 9], b""), 1)  # no hello: not its business


def test_long_text_is_clipped_to_fit() -> None:
    assert messages.clip("short") == "short"
    clipped = messages.clip("\U0001f600" * 1_000_000)
    assert len(clipped) == messages.MAX_TEXT
    messages.encode(messages.Failure(1, "internal", clipped, clipped))


def test_a_message_that_does_not_fit_is_our_error() -> None:
    with pytest.raises(LocalProtocolError):
        messages.encode(messages.Notify("x", ["y" * 300_000]))
