"""The frames of a session, typed.

On the wire a frame's header is ``[type, *fields]``. The law: types and the order of fields never change
within a major version; new fields are appended with a default. ``HELLO`` is read in two steps, and its
first field is the major version in every version there will ever be, so that strangers understand
enough of each other to say why they part.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Final

from protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR, codec
from protocol.bulk import Loan
from protocol.codec import record
from protocol.errors import DecodeError, ErrorCode, RemoteProtocolError
from protocol.frames import MAX_PAYLOAD, PREFIX, Buffer, Frame, encode_frame

# Characters of an explanation; longer ones are cut, so that a failure always fits into a frame.
MAX_TEXT: Final = 4096


@record
class BulkOffer:
    """The guest has memory for payloads (``bulk``): where the host finds it, and how it knows that it is the same.

    ``extents``: offset and length in bytes of each piece in the device, in the order of the memory. ``mark``: 16 random
    bytes that stand on the plane's mark page. ``busy``: a bitmap of the host's slots that the guest still reads.
    """

    extents: list[int]
    mark: bytes
    busy: bytes = b""


@record
class Hello:
    """The first frame of either side.

    ``digest`` names the sources (``protocol.build``), ``boot_id`` the kernel's run, ``name`` is for logs.
    """

    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR
    digest: str = ""
    boot_id: str = ""
    capabilities: list[str] = field(default_factory=list)
    name: str = ""
    bulk: BulkOffer | None = None


@record
class Ping:
    """Are you there? ``token`` comes back in the ``Pong``."""

    token: int


@record
class Pong:
    token: int


@record
class Request:
    """A question. ``timeout`` is in seconds from its arrival; None waits for as long as the link lives."""

    id: int
    method: str
    args: object
    timeout: float | None = None


@record
class Reply:
    id: int
    value: object


@record
class Failure:
    """The other answer to a request. ``code`` is the text of an ``ErrorCode``."""

    id: int
    code: str
    message: str
    hint: str = ""


@record
class Cancel:
    """The asker no longer wants the answer, which is sent all the same."""

    id: int


@record
class Notify:
    topic: str
    args: object


@record
class Open:
    """A new stream, wanted. ``window`` is the credit, in bytes, that the other side starts with."""

    stream: int
    kind: str
    args: object
    window: int


@record
class Opened:
    """The stream is there. ``window`` as in ``Open``; data may only follow this."""

    stream: int
    window: int


@record
class Refused:
    stream: int
    code: str
    message: str
    hint: str = ""


@record
class Data:
    """Bytes of a stream, at least one. They are the frame's payload, not part of its header, or in ``run``."""

    stream: int
    payload: bytes | memoryview
    run: list[int] | None = None
    loan: Loan | None = None


@record
class Credit:
    """The receiver has consumed ``count`` bytes; that many more may be sent."""

    stream: int
    count: int


@record
class Eof:
    """The sender's direction of the stream has ended; the other lives on (half-close)."""

    stream: int


@record
class Reset:
    """Both directions are cut. Answered by a ``Reset``, unless both sides had already sent all they had."""

    stream: int
    code: str
    message: str


@record
class Goodbye:
    """The last frame of either side. The code is ``gone`` for an ordinary end, else what went wrong."""

    code: str
    reason: str


@record
class Call:
    """A filesystem operation (``protocol.files``): cheaper than a request, and with bytes as its payload.

    It has no deadline and is not cancelled: the side that asks decides how long it cares.
    """

    id: int
    op: int
    args: object
    payload: bytes | memoryview = b""
    run: list[int] | None = None
    loan: Loan | None = None


@record
class Result:
    """The answer to a call. ``errno`` is 0 for success, else ``value`` is None; numbers are Linux's."""

    id: int
    errno: int
    value: object
    payload: bytes | memoryview = b""
    run: list[int] | None = None
    loan: Loan | None = None


@record
class BulkBegin:
    """The host has found the guest's memory: from here on both sides may refer to it. ``busy`` as in the offer."""

    busy: bytes


@record
class Free:
    """The receiver does not read these of the sender's slots any more: a bitmap."""

    slots: bytes


AnyFrame = (
    Hello
    | Ping
    | Pong
    | Request
    | Reply
    | Failure
    | Cancel
    | Notify
    | Open
    | Opened
    | Refused
    | Data
    | Credit
    | Eof
    | Reset
    | Goodbye
    | Call
    | Result
    | BulkBegin
    | Free
)
StreamFrame = Opened | Refused | Data | Credit | Eof | Reset

TYPES: Final[dict[int, type[AnyFrame]]] = {
    1: Hello,
    2: Ping,
    3: Pong,
    4: Request,
    5: Reply,
    6: Failure,
    7: Cancel,
    8: Notify,
    9: Open,
    10: Opened,
    11: Refused,
    12: Data,
    13: Credit,
    14: Eof,
    15: Reset,
    16: Goodbye,
    17: Call,
    18: Result,
    19: BulkBegin,
    20: Free,
}
_NUMBERS: Final[dict[type, int]] = {cls: number for number, cls in TYPES.items()}
_CALL: Final = _NUMBERS[Call]
_RESULT: Final = _NUMBERS[Result]
_THREE_NUMBERS: Final = [int, int, int]
# Their last header field may say where the payload is in the plane's memory (``bulk``): [first slot, length].
_WITH_PAYLOAD: Final = (Data, Call, Result)


def clip(text: str) -> str:
    """``text``, or its first ``MAX_TEXT`` characters."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def encode(frame: AnyFrame) -> list[Buffer]:
    """The buffers of one frame. Raises ``LocalProtocolError`` when it is too long or not encodable."""
    match frame:
        case Data():
            return encode_data(frame.stream, frame.payload, frame.run)
        case Call():
            return encode_call(frame.id, frame.op, frame.args, frame.payload, frame.run)
        case Result():
            return encode_result(frame.id, frame.errno, frame.value, frame.payload, frame.run)
    return encode_frame([_NUMBERS[type(frame)], *codec.encode(frame)])


def data_header(stream: int) -> bytes:
    """The header of the ``Data`` frames of ``stream``."""
    header = encode_frame([_NUMBERS[Data], stream])[0]
    return bytes(header[PREFIX.size :])


def encode_data(stream: int, payload: Buffer, run: list[int] | None = None) -> list[Buffer]:
    """The buffers of a ``Data`` frame, without a copy of ``payload``."""
    header = [_NUMBERS[Data], stream]
    return encode_frame(header if run is None else [*header, run], payload)


def encode_call(
    number: int,
    op: int,
    args: object,
    payload: Buffer,
    run: list[int] | None = None,
    *,
    max_payload: int = MAX_PAYLOAD,
) -> list[Buffer]:
    """The buffers of a ``Call``, without a copy of ``payload``."""
    header = [_CALL, number, op, args]
    return encode_frame(header if run is None else [*header, run], payload, max_payload=max_payload)


def encode_result(
    number: int,
    errno: int,
    value: object,
    payload: Buffer,
    run: list[int] | None = None,
    *,
    max_payload: int = MAX_PAYLOAD,
) -> list[Buffer]:
    """The buffers of a ``Result``, without a copy of ``payload``."""
    header = [_RESULT, number, errno, value]
    return encode_frame(header if run is None else [*header, run], payload, max_payload=max_payload)


def decode(frame: Frame) -> AnyFrame:
    """The typed frame. Raises ``RemoteProtocolError`` for a type or shape that does not exist."""
    header, payload = frame
    if type(header) is list and len(header) == 4 and [*map(type, header[:3])] == _THREE_NUMBERS:
        # Nearly all that comes by the thousand.
        if header[0] == _RESULT:
            return Result(header[1], header[2], header[3], payload)
        if header[0] == _CALL:
            return Call(header[1], header[2], header[3], payload)
    cls = _frame_class(header)
    fields: list[Any] = header[1:]
    if cls in _WITH_PAYLOAD:
        return _decode_with_payload(cls, fields, payload)
    if payload:
        raise RemoteProtocolError(f"{cls.__name__}: a payload where there is none")
    try:
        return codec.decode(cls, fields)
    except DecodeError as error:
        raise RemoteProtocolError(str(error)) from error


def _decode_with_payload(cls: type[Any], fields: list[Any], payload: bytes) -> AnyFrame:
    """By hand: these are the frames that come by the thousand."""
    count = 1 if cls is Data else 3
    if len(fields) < count:
        raise RemoteProtocolError(f"{cls.__name__}: {len(fields)} fields where there are {count}")
    run = fields[count] if len(fields) > count else None
    if run is not None and (payload or type(run) is not list or list(map(type, run)) != [int, int]):
        raise RemoteProtocolError(f"{cls.__name__}: {run!r:.64} is no reference to a payload")
    if type(fields[0]) is not int or (cls is not Data and type(fields[1]) is not int):
        raise RemoteProtocolError(f"{cls.__name__}: a number is missing")
    frame: AnyFrame = cls(*fields[:count], payload, run)
    return frame


def check_major(frame: Frame, major: int) -> None:
    """If this is a hello, raise ``RemoteProtocolError`` (``VERSION``) unless its major version is ours.

    Looks at nothing but the first field: the rest of a stranger's hello may have any shape.
    """
    if _frame_class(frame.header) is not Hello:
        return
    theirs = frame.header[1] if len(frame.header) > 1 else None
    if theirs != major:
        raise RemoteProtocolError(
            f"the peer speaks version {theirs!r} of the protocol, this side version {major}",
            ErrorCode.VERSION,
        )


def _frame_class(header: Any) -> type[AnyFrame]:
    if type(header) is not list or not header:
        raise RemoteProtocolError("a header that is not an array of at least a type")
    kind = header[0]
    if type(kind) is not int or kind not in TYPES:
        raise RemoteProtocolError(f"a frame of unknown type {kind!r:.64}")
    return TYPES[kind]
