"""What dockerd says, from a socket that the test has made."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from guest_agent import dockerd

HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
PATIENCE, MOST = 20.0, 1 << 10


@contextmanager
def answering(path: Path, *pieces: bytes, stays: bool = False) -> Iterator[list[bytes]]:
    """One that says ``pieces``, one by one, and hangs up, or ``stays``."""
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                asked.append(client.recv(4096))
                for piece in pieces:
                    client.sendall(piece)
                if stays:
                    client.recv(1)  # until the other side has enough

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_an_answer_in_pieces(tmp_path: Path) -> None:
    docker = tmp_path / "s"
    with answering(docker, HEAD[:10], HEAD[10:] + b"[1,", b"2]") as asked:
        assert dockerd.ask(docker, "/volumes", PATIENCE, MOST) == b"[1,2]"
    assert asked[0].startswith(b"GET /volumes HTTP/1.0\r\n")


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [([b"HTTP/1.0 500 No\r\n\r\n{}"], "refused"), ([b""], "refused"), ([HEAD, b"x" * MOST], "too much")],
)
def test_no_answer(tmp_path: Path, pieces: Sequence[bytes], problem: str) -> None:
    docker = tmp_path / "s"
    with answering(docker, *pieces), pytest.raises(ValueError, match=problem):
        dockerd.ask(docker, "/volumes", PATIENCE, MOST)
    with pytest.raises(OSError, match="No such file"):
        dockerd.ask(tmp_path / "none", "/volumes", PATIENCE, MOST)


def test_an_event_is_heard_while_dockerd_goes_on_talking(tmp_path: Path) -> None:
    docker = tmp_path / "s"
    with answering(docker, HEAD[:20], HEAD[20:], b'{"Action":"reload"}\n', stays=True) as asked:
        assert dockerd.hear(docker, "daemon", "reload", 12.5, PATIENCE)
    url = urlsplit(asked[0].split()[1].decode())
    query = parse_qs(url.query)
    assert (url.path, query["since"]) == ("/events", ["12.500000000"])
    assert json.loads(query["filters"][0]) == {"type": ["daemon"], "event": ["reload"]}


@pytest.mark.parametrize(
    "pieces", [[HEAD], [b"HTTP/1.0 400 No\r\n\r\n{}"], [b""], [b"x" * (dockerd.MAX_HEAD + 1)]]
)
def test_a_dockerd_that_hangs_up_refuses_or_talks_for_ever_told_of_nothing(
    tmp_path: Path, pieces: Sequence[bytes]
) -> None:
    docker = tmp_path / "s"
    with answering(docker, *pieces):
        assert not dockerd.hear(docker, "daemon", "reload", 0.0, PATIENCE)


def test_silence_is_waited_for_and_no_longer(tmp_path: Path) -> None:
    docker = tmp_path / "s"
    with answering(docker, HEAD, stays=True):
        assert not dockerd.hear(docker, "daemon", "reload", 0.0, 0.05)
    assert not dockerd.hear(tmp_path / "none", "daemon", "reload", 0.0, PATIENCE)
