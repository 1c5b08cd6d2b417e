from __future__ import annotations

import pytest

from protocol.api import DialTcp, Done, Listeners, StopInstance
from protocol.errors import DecodeError, ErrorCode, LocalProtocolError, OpenRefused, RpcError
from protocol.muxstream import Incoming
from protocol.service import Service


async def done(message: StopInstance) -> Done:
    return Done()


async def take(target: DialTcp, incoming: Incoming) -> None:
    raise AssertionError


async def hear(notice: Listeners) -> None:
    raise AssertionError


async def test_a_request_is_decoded_and_its_reply_encoded() -> None:
    service = Service()
    service.on_request(StopInstance, done)
    bound = service.bind_request("stop", [True])
    assert bound.message == StopInstance(force=True)
    assert await bound.run() == []


async def test_a_reply_of_another_type_is_a_bug() -> None:
    service = Service()

    async def wrong(message: StopInstance) -> int:
        return 1

    service.on_request(StopInstance, wrong)
    with pytest.raises(TypeError, match="stop was answered with a int"):
        await service.bind_request("stop", []).run()


def test_what_nothing_here_answers() -> None:
    service = Service()
    with pytest.raises(RpcError) as request:
        service.bind_request("x" * 10_000, [])
    assert request.value.code is ErrorCode.UNSUPPORTED
    assert len(request.value.message) < 200
    with pytest.raises(OpenRefused) as stream:
        service.bind_stream("tcp", [])
    assert stream.value.code is ErrorCode.UNSUPPORTED
    assert service.bind_notice("event", []) is None


def test_what_has_the_wrong_shape() -> None:
    service = Service()
    service.on_request(StopInstance, done)
    service.on_stream(DialTcp, take)
    service.on_notice(Listeners, hear)
    with pytest.raises(RpcError, match=r"StopInstance\.force") as request:
        service.bind_request("stop", ["yes"])
    assert request.value.code is ErrorCode.INVALID
    with pytest.raises(OpenRefused, match=r"DialTcp\.port") as stream:
        service.bind_stream("tcp", ["::1", "80"])
    assert stream.value.code is ErrorCode.INVALID
    with pytest.raises(DecodeError):
        service.bind_notice("listeners", [1])


def test_one_handler_each() -> None:
    service = Service()
    service.on_request(StopInstance, done)
    with pytest.raises(LocalProtocolError, match="stop"):
        service.on_request(StopInstance, done)
