"""What a symlink of the guest's is shown as: something that leads nowhere but below its own place.

This machine's kernel follows what it is shown. So an absolute target, which means the guest's root, is shown as a way
from where the link is to the root of its place; and one that climbs out of that stops there, as ``..`` of a root does.

The law: in what is shown ``..`` comes first or not at all, and no more often than the link has directories of its
place above it. Behind a name it could follow another symlink, and climb from where that leads; so a name and the ``..``
behind it are left out together. (Where that name was a symlink to a directory the target is another one than the
guest's: seldom meant, and never outside.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_TARGET: Final = 4095
"""Bytes (PATH_MAX, without the NUL)."""


def shown(target: bytes, depth: int, root: Sequence[bytes] = ()) -> bytes:
    """``target`` of a link that has ``depth`` directories of its place above it (0: it is in the root of the place).

    ``root`` are the components of the place's own path in the guest, if that is known: absolute targets below it are
    below the place. What needs no change is returned as it is.
    """
    if target.startswith(b"/"):
        words = _resolved(target)
        if root and words[: len(root)] == list(root):
            words = words[len(root) :]
        return _joined(depth, words)
    climbs, names, rewritten = 0, list[bytes](), False
    for word in _words(target):
        if word != b"..":
            names.append(word)
            continue
        rewritten = rewritten or bool(names) or climbs == depth
        if names:
            names.pop()
        elif climbs < depth:
            climbs += 1
    return _joined(climbs, names) if rewritten else target


def shown_in(target: bytes, depth: int, place: Sequence[bytes], beside: Sequence[bytes]) -> bytes:
    """The same, where the guest's root is a place of its own, at ``beside``; ``place`` is where the link's is. Both are
    components of paths in the view."""
    if not target.startswith(b"/"):
        return shown(target, depth)
    return _joined(depth + len(place), [*beside, *_resolved(target)])


def _words(target: bytes) -> list[bytes]:
    return [word for word in target.split(b"/") if word not in (b"", b".")]


def _resolved(target: bytes) -> list[bytes]:
    """The names of an absolute one."""
    names: list[bytes] = []
    for word in _words(target):
        if word != b"..":
            names.append(word)
        elif names:
            names.pop()
    return names


def _joined(climbs: int, names: Sequence[bytes]) -> bytes:
    return b"/".join([*[b".."] * climbs, *names]) or b"."
