"""A process that looks at files, and says what it sees: one JSON request a line on stdin, one answer on stdout.

    python3 -B looker.py

It runs beside the mount, in the current directory, and imports nothing of ours. The same ``look`` is called on the host,
so that two views can be compared by ``==``. Left out of a view: atime and blocks, which nobody promises.

A request is a list, the name of a method of ``Eyes`` and its arguments; the answer is what it returns, or ``{"error": ...}``.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

View = dict[str, Any]
"""What was seen of a name. ``errno`` if there is none; else its attributes (times in ns) and, as it is, the ``content``
(latin-1), the ``target``, or the ``names`` in it, sorted."""

STEP = 0.002
"""Seconds between two looks of somebody who waits."""


def look(path: str, content: bool = True) -> View:
    """What ``path`` is. Without ``content`` only what stat(2) tells."""
    try:
        status = os.lstat(path)
    except OSError as error:
        return {"errno": errno.errorcode[error.errno or 0]}
    view: View = {
        "ino": status.st_ino,
        "mode": status.st_mode,
        "nlink": status.st_nlink,
        "owner": [status.st_uid, status.st_gid],
        "size": status.st_size,
        "mtime": status.st_mtime_ns,
        "ctime": status.st_ctime_ns,
    }
    try:
        if not content:
            pass
        elif stat.S_ISREG(status.st_mode):
            view["content"] = read(path).decode("latin-1")
        elif stat.S_ISLNK(status.st_mode):
            view["target"] = os.readlink(path)
        elif stat.S_ISDIR(status.st_mode):
            view["names"] = sorted(os.listdir(path))
    except OSError as error:
        view["unread"] = errno.errorcode[error.errno or 0]
    return view


def read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        pieces = []
        while piece := os.read(descriptor, 1 << 17):
            pieces.append(piece)
    finally:
        os.close(descriptor)
    return b"".join(pieces)


def tree(top: str, content: bool = True) -> dict[str, View]:
    """``look`` at ``top`` and at all that is below it, by the path from there."""
    found = {"": look(top, content)}
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        try:
            names = os.listdir(os.path.join(top, directory))
        except OSError:
            continue
        for name in names:
            path = os.path.join(directory, name)
            found[path] = look(os.path.join(top, path), content)
            if stat.S_ISDIR(found[path].get("mode", 0)):
                waiting.append(path)
    return found


class Eyes:
    """What may be asked for."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {"os": os}

    def look(self, path: str, content: bool = True) -> View:
        return look(path, content)

    def tree(self, top: str, content: bool = True) -> dict[str, View]:
        return tree(top, content)

    def record(self, paths: list[str], stop: str) -> list[list[View]]:
        """Look at all ``paths`` again and again until the file ``stop`` exists: of each, every view that was another
        than the one before it."""
        views: list[list[View]] = [[] for _ in paths]
        over = False
        while not over:
            over = os.path.exists(stop)
            for path, seen in zip(paths, views, strict=True):
                view = look(path)
                if not seen or view != seen[-1]:
                    seen.append(view)
            time.sleep(STEP)
        return views

    def run(self, script: str) -> None:
        """Execute Python, with the variables of earlier ones."""
        exec(script, self._kept)

    def value(self, expression: str) -> Any:
        """Of a Python expression, with the variables of scripts that were run; an errno's name if it fails with one."""
        try:
            return eval(expression, self._kept)
        except OSError as error:
            return errno.errorcode[error.errno or 0]


def serve(lines: Any, answer: Callable[[str], object]) -> None:
    eyes = Eyes()
    for line in lines:
        name, *arguments = json.loads(line)
        try:
            said = getattr(eyes, name)(*arguments)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        answer(json.dumps(said) + "\n")


def main() -> None:
    def answer(line: str) -> None:
        sys.stdout.write(line)
        sys.stdout.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
