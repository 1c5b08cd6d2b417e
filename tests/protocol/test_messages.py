from __future__ import annotations

from typing import Any

import pytest

from protocol import messages
from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.frames import Frame, FrameDecoder

ONE_OF_EACH: list[messages.AnyFrame] = [
    messages.Hello(
        1, 2, "d1g357", "boot", ["a", "b"], "host", messages.BulkOffer([4096, 8192], b"mark", b"\x03")
    ),
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
    messages.Call(1, 31, [7, 8, 9, 0, False, False], b"\x00\xff"),
    messages.Result(1, 0, [2, 0, bytes(88), False], b"\x00\xff"),
    messages.BulkBegin(b"\x00\x01"),
    messages.Free(b"\xff"),
]

BY_REFERENCE: list[messages.AnyFrame] = [
    messages.Data(1, b"", [7, 5000]),
    messages.Call(1, 31, [7, 8], b"", [0, 1 << 20]),
    messages.Result(1, 0, [2], b"", [63, 1]),
]


def through_the_wire(frame: messages.AnyFrame) -> messages.AnyFrame:
    decoder = FrameDecoder()
    decoder.receive_data(b"".join(messages.encode(frame)))
    raw = decoder.next_frame()
    assert raw is not None
    return messages.decode(raw)


@pytest.mark.parametrize("frame", ONE_OF_EACH + BY_REFERENCE, ids=lambda frame: type(frame).__name__)
def test_every_frame_comes_back(frame: messages.AnyFrame) -> None:
    assert through_the_wire(frame) == frame


def test_there_is_one_of_each() -> None:
    assert [type(frame) for frame in ONE_OF_EACH] == list(messages.TYPES.values())


@pytest.mark.parametrize("header", [[], {}, 1, None, "x", [0], [21], [-1], ["1"], [None], [True], [1.0]])
def test_an_unknown_type_is_the_peers_error(header: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode(Frame(header, b""))


@pytest.mark.parametrize(
    "header",
    [
        [2],
        [2, "x"],
        [4, 1, "m"],
        [9, 1, "k", []],
        [16, 1, 2],
        [17, 1, 2],
        [17, 1, "2", []],
        [18, 1, 0],
        [18, 1, None, []],
    ],
)
def test_a_wrong_shape_is_the_peers_error(header: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode(Frame(header, b""))


@pytest.mark.parametrize(("header", "name"), [([2, 1], "Ping"), ([5, 2, []], "Reply"), ([14, 1], "Eof")])
def test_only_data_calls_and_results_have_a_payload(header: list[Any], name: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{name}: a payload"):
        messages.decode(Frame(header, b"x"))


@pytest.mark.parametrize(
    ("header", "frame"),
    [
        ([12, 1], messages.Data(1, b"payload")),
        ([17, 1, 30, []], messages.Call(1, 30, [], b"payload")),
        ([18, 1, 5, None], messages.Result(1, 5, None, b"payload")),
    ],
)
def test_what_a_later_version_adds_is_ignored(header: list[Any], frame: messages.AnyFrame) -> None:
    assert messages.decode(Frame([*header, None, b"of the future"], b"payload")) == frame


@pytest.mark.parametrize("header", [[12, 1], [17, 1, 30, []], [18, 1, 5, None]])
@pytest.mark.parametrize(
    "run",
    [b"payload", "x", 7, True, {}, [], [1], [1, 2, 3], ["1", 2], [1, None], [True, 1], [1.0, 2], [[1], 2]],
)
def test_what_is_no_reference_is_the_peers_error(header: list[Any], run: object) -> None:
    with pytest.raises(RemoteProtocolError, match="no reference"):
        messages.decode(Frame([*header, run], b""))


@pytest.mark.parametrize("header", [[12, 1], [17, 1, 30, []], [18, 1, 5, None]])
def test_a_payload_is_in_the_frame_or_elsewhere_and_not_both(header: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="no reference"):
        messages.decode(Frame([*header, [1, 2]], b"payload"))


def test_a_peer_that_knows_nothing_of_memory_says_hello_all_the_same() -> None:
    old = Frame([1, 1, 2, "digest", "boot", [], "name"], b"")
    assert messages.decode(old) == messages.Hello(1, 2, "digest", "boot", [], "name", None)


def test_the_limit_of_a_payload_is_the_links() -> None:
    megabyte = bytes(1 << 20)
    for encode in (messages.encode_call, messages.encode_result):
        with pytest.raises(LocalProtocolError, match="1048576 bytes; the limit is 65536"):
            encode(1, 2, [], megabyte)
        start, payload = encode(1, 2, [], megabyte, max_payload=1 << 20)
        assert payload is megabyte  # passed through, not copied
        assert len(start) < 20


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
