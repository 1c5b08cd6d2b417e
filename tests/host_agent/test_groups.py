from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from host_agent import groups
from host_agent.errors import UserError
from protocol.errors import LinkClosed, LinkError


def raising(*errors: BaseException) -> None:
    with groups.collapsed():
        raise BaseExceptionGroup("nursery", [BaseExceptionGroup("inner", list(errors))])


@pytest.mark.parametrize("make", [lambda: ValueError("x"), lambda: LinkError("lost"), KeyboardInterrupt])
def test_a_single_error_comes_as_it_was_raised(make: Callable[[], BaseException]) -> None:
    error = make()
    with pytest.raises(type(error)) as caught:
        raising(error)
    assert caught.value is error


def test_of_several_expected_errors_the_most_telling_is_raised() -> None:
    told = UserError("the instance was stopped")
    with pytest.raises(UserError) as caught:
        raising(LinkClosed("gone"), trio.BrokenResourceError("gone"), told)
    assert caught.value is told
    with pytest.raises(KeyboardInterrupt):
        raising(told, KeyboardInterrupt(), SystemExit(3))
    with pytest.raises(LinkClosed):
        raising(trio.ClosedResourceError(), LinkClosed("gone"))


def test_a_bug_is_never_hidden_behind_an_expected_error() -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        raising(UserError("stopped"), ZeroDivisionError())
    assert [type(error) for error in groups.leaves(caught.value)] == [UserError, ZeroDivisionError]


def test_run_is_trio_run_without_groups() -> None:
    async def answer(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return number

    async def fail() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise UserError("no")

    assert groups.run(answer, 5) == 5
    with pytest.raises(UserError, match="no"):
        groups.run(fail)


def test_without_an_error_nothing_is_raised() -> None:
    with groups.collapsed():
        pass
