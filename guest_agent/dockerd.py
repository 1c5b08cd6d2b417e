"""Questions to the dockerd of this machine, over its socket, in HTTP/1.0: an answer is not in chunks.

They block, for a worker thread. A question starts a dockerd that was stopped (socket activation): who does not want
that looks first whether it runs. Docker Engine API: https://docs.docker.com/reference/api/engine/
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from urllib.parse import quote

SOCKET = Path("/run/docker.sock")

MAX_HEAD = 64 << 10
"""Bytes before an answer's body."""


def ask(docker: Path, path: str, patience: float, most: int) -> bytes:
    """The body of the answer, of ``most`` bytes with its head. ``patience``: seconds for each word of it. Raises
    ``OSError``, and ``ValueError`` if dockerd refuses or says too much."""
    answer = bytearray()
    with _connected(docker, path, patience) as connection:
        while data := connection.recv(65536):
            answer += data
            if len(answer) > most:
                raise ValueError("dockerd says too much")
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if not _is_answer(head):
        raise ValueError(f"dockerd refused {path}")
    return body


def hear(docker: Path, kind: str, event: str, since: float, patience: float) -> bool:
    """Whether dockerd told of such an event after ``since``, a time of this machine's clock, within ``patience``
    seconds from now; False as well if it does not answer."""
    filters = quote(json.dumps({"type": [kind], "event": [event]}), safe="")
    heard = bytearray()
    until = time.monotonic() + patience
    try:
        with _connected(docker, f"/events?since={since:.9f}&filters={filters}", patience) as connection:
            while len(heard) < MAX_HEAD and (left := until - time.monotonic()) > 0:
                connection.settimeout(left)
                data = connection.recv(65536)
                heard += data
                head, _, body = bytes(heard).partition(b"\r\n\r\n")
                if body or not data:
                    return bool(body) and _is_answer(head)
    except OSError:
        pass
    return False


def request(path: str) -> bytes:
    """What asks for ``path``."""
    return f"GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n".encode()


def _connected(docker: Path, path: str, patience: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(patience)
        connection.connect(os.fspath(docker))
        connection.sendall(request(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _is_answer(head: bytes) -> bool:
    return b" 200 " in head.split(b"\r\n")[0]
