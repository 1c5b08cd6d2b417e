"""How a tree is served, where that is not as the host serves its folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fileserver.linux import Status


def _of_this_tree(device: int) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Manner:
    """``open_root`` returns an O_PATH descriptor of the root, the caller's, in place of a walk to a path: of what has
    none. ``inherit``: what is made belongs to who owns the root, as far as we may give files away. ``is_foreign`` tells
    of a device (st_dev) whether its directories are shown empty. ``look_every``: seconds between two looks at the root.
    """

    open_root: Callable[[], int] | None = None
    inherit: bool = False
    is_foreign: Callable[[int], bool] = _of_this_tree
    look_every: float = 1.0


PLAIN = Manner()


def is_new(status: Status, uid: int) -> bool:
    """Whether what was just made by ``uid`` may be that: a file with other names was there before."""
    return status.uid == uid and (status.nlink == 1 or status.is_directory)
