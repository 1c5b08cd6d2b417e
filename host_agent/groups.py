"""What a nursery's exception group comes down to.

Nurseries wrap whatever comes out of them, a single error too. Where one cause is expected (the link was
lost, the user pressed ^C), the group is unwrapped at the seam, so that the code around it can catch what
it knows by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar, TypeVarTuple

import trio

from host_agent.errors import UserError
from protocol.errors import LinkError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Which of several errors is told, most telling first.
_BY_WEIGHT = (
    KeyboardInterrupt,
    SystemExit,
    UserError,
    LinkError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)


def leaves(error: BaseException) -> list[BaseException]:
    """The errors that are not groups, in order."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


@contextlib.contextmanager
def collapsed() -> Iterator[None]:
    """Raise the one telling error of a group instead of the group.

    A group with an error that nobody expects stays as it is: hiding it would hide a bug.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        found = leaves(group)
        if len(found) == 1:
            raise found[0] from None
        for kind in _BY_WEIGHT:
            for leaf in found:
                if isinstance(leaf, kind) and all(isinstance(other, _BY_WEIGHT) for other in found):
                    raise leaf from None
        raise


def run(function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
    """``trio.run`` whose errors come as they were raised, not as groups."""
    with collapsed():
        return trio.run(function, *arguments)
