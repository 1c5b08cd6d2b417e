"""Docker's socket over real sockets, with a dockerd of a few lines behind it; and the docker CLI, if there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from host_agent import docker_socket
from host_agent.docker_socket import OWN_SOCKET, CheckedClient, docker_forwarder
from protocol.api import MountSpec, Target

OK = b"HTTP/1.1 200 OK\r\nApi-Version: 1.45\r\nContent-Length: 2\r\n\r\nOK"
CREATED = b'HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 26\r\n\r\n{"Id":"abc","Warnings":[]}'
PING = b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n"

Server = Callable[[trio.abc.HalfCloseableStream], Any]


def create(*binds: str) -> bytes:
    body = json.dumps({"Image": "x", "HostConfig": {"Binds": binds}}).encode()
    return b"POST /v1.45/containers/create HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


class Dockerd:
    """Answers each request of a connection, and ends it when the client has ended, as Go's server does."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.delay = 0.0

    async def serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        async with stream:
            received = b""
            while True:
                while b"\r\n\r\n" not in received:
                    data = await stream.receive_some()
                    if not data:
                        assert not received, "half a request"
                        return
                    received += bytes(data)
                head, _, received = received.partition(b"\r\n\r\n")
                self.heads.append(head.split(b"\r\n")[0])
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"Content-Length:"), 0
                )
                while len(received) < length:
                    received += bytes(await stream.receive_some())
                received = received[length:]
                await trio.sleep(self.delay)
                without_body = head.startswith(b"HEAD")
                answer = CREATED if b"/create" in head else OK
                await stream.send_all(
                    answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if without_body else answer
                )


@asynccontextmanager
async def forwarding(path: Path, server: Server, *shares: Path) -> AsyncIterator[None]:
    """Docker's socket at ``path``; ``shares`` are shared under their own names. Fails rather than hangs."""
    specs = [MountSpec(str(share), str(share)) for share in shares]
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def dial(target: Target) -> trio.abc.HalfCloseableStream:
                ours, theirs = await _socket_pair()
                nursery.start_soon(server, theirs)
                return ours

            await nursery.start(docker_forwarder(path, dial, lambda: specs).run)
            yield
            nursery.cancel_scope.cancel()


async def _socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = trio.socket.socketpair()
    return trio.SocketStream(ours), trio.SocketStream(theirs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = await stream.receive_some(size - len(received))
        assert data, received
        received += bytes(data)
    return received


def message(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), answer
    text: str = json.loads(body)["message"]
    return text


# --- the order of things -----------------------------------------------------------------------------


async def test_what_is_shared_reaches_dockerd_and_the_connection_goes_on(path: Path, home: Path) -> None:
    dockerd = Dockerd()
    async with forwarding(path, dockerd.serve, home):
        async with await trio.open_unix_socket(path) as client:
            for request, answer in ((PING, OK), (create(f"{home}:/x"), CREATED), (PING, OK)):
                await client.send_all(request)
                assert await exactly(client, len(answer)) == answer
    assert dockerd.heads[1].startswith(b"POST /v1.45/containers/create")


async def test_what_is_not_shared_is_refused_and_dockerd_never_hears_of_it(path: Path, home: Path) -> None:
    dockerd = Dockerd()
    async with forwarding(path, dockerd.serve, home):
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(PING)
            assert await exactly(client, len(OK)) == OK
            await client.send_all(create(f"{home}:/x", "/srv/data:/y"))
            assert message(await everything(client)).startswith("mounts denied: /srv/data is not shared")
    assert dockerd.heads == [b"GET /_ping HTTP/1.1"]


async def test_a_refusal_comes_after_the_answers_that_were_due_before_it(path: Path) -> None:
    dockerd = Dockerd()
    dockerd.delay = 0.2
    async with forwarding(path, dockerd.serve):
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(PING + PING + create("/srv/data:/y") + PING)
            answer = await everything(client)
    assert answer.startswith(OK + OK + b"HTTP/1.1 400 ")
    assert len(dockerd.heads) == 2


async def test_a_client_may_end_its_side_before_the_answer(path: Path, home: Path) -> None:
    async with forwarding(path, Dockerd().serve, home):
        for request, start in ((create(f"{home}:/x"), CREATED), (create("/srv:/x"), b"HTTP/1.1 400 ")):
            async with await trio.open_unix_socket(path) as client:
                await client.send_all(request)
                await client.send_eof()
                assert (await everything(client)).startswith(start)


async def test_half_a_request_is_left_to_dockerd(path: Path) -> None:
    received = bytearray()

    async def listen(stream: trio.abc.HalfCloseableStream) -> None:
        async with stream:
            received.extend(await everything(stream))
            await stream.send_all(b"odd")

    half = create("/srv/data:/y")[:-5]
    async with forwarding(path, listen):
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(half)
            await client.send_eof()
            assert await everything(client) == b"odd"
    assert received == half


async def test_the_socket_itself_is_refused_with_its_name_in_the_vm(path: Path) -> None:
    async with forwarding(path, Dockerd().serve, path.parent):
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(create(f"{path}:/var/run/docker.sock"))
            assert OWN_SOCKET in message(await everything(client))


async def test_many_connections_are_judged_at_once(path: Path, home: Path) -> None:
    async def use(number: int) -> None:
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(create(f"{home if number % 2 else '/srv'}:/x"))
            await client.send_eof()
            answers[number] = (await everything(client))[:12]

    answers: dict[int, bytes] = {}
    async with forwarding(path, Dockerd().serve, home):
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(use, number)
    assert [answers[number] for number in range(60)] == [b"HTTP/1.1 400", b"HTTP/1.1 201"] * 30


async def test_a_check_that_hangs_holds_up_its_own_connection_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a dead network filesystem does."""
    release = threading.Event()

    def hang(source: str, shares: object) -> str | None:
        return None if release.wait(20) else "gave up"

    monkeypatch.setattr(docker_socket.bind_sources, "refusal", hang)
    async with forwarding(path, Dockerd().serve):
        async with await trio.open_unix_socket(path) as stuck, await trio.open_unix_socket(path) as client:
            await stuck.send_all(create("/dead/nfs:/x"))
            await client.send_all(PING)
            assert await exactly(client, len(OK)) == OK
            release.set()
            assert await exactly(stuck, len(CREATED)) == CREATED


# --- as good as without ------------------------------------------------------------------------------


async def test_a_large_build_context_passes_whole_and_a_slow_reader_stops_it(path: Path) -> None:
    reading = trio.Event()
    received = 0

    async def read_late(stream: trio.abc.HalfCloseableStream) -> None:
        nonlocal received
        await reading.wait()
        async with stream:
            async for data in stream:
                received += len(data)
            await stream.send_all(OK)

    head = b"POST /v1.45/build HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (1 << 20, bytes(1 << 20))
    async with forwarding(path, read_late):
        async with await trio.open_unix_socket(path) as client:
            sent = trio.Event()

            async def send() -> None:
                await client.send_all(head)
                for _ in range(64):
                    await client.send_all(chunk)
                await client.send_all(b"0\r\n\r\n")
                await client.send_eof()
                sent.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                with trio.move_on_after(0.3):
                    await sent.wait()
                assert not sent.is_set()
                reading.set()
                assert await everything(client) == OK
    assert received == len(head) + 64 * len(chunk) + 5


async def test_an_attached_terminal_is_not_waited_for(path: Path) -> None:
    """Each byte of the input goes on at once, also of what looks like the beginning of a request."""

    async def echo(stream: trio.abc.HalfCloseableStream) -> None:
        async with stream:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += bytes(await stream.receive_some(1))
            await stream.send_all(b"HTTP/1.1 101 UPGRADED\r\n\r\n")
            async for data in stream:
                await stream.send_all(data)

    upgrade = (
        b"POST /v1.45/containers/abc/attach?stdin=1 HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    )
    async with forwarding(path, echo):
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(upgrade)
            await exactly(client, len(b"HTTP/1.1 101 UPGRADED\r\n\r\n"))
            for byte in b"POST /containers/create":
                await client.send_all(bytes([byte]))
                assert await exactly(client, 1) == bytes([byte])
            await client.send_eof()
            assert await everything(client) == b""


async def test_a_stream_is_read_in_the_pieces_that_were_asked_for() -> None:
    client, far = trio.testing.memory_stream_pair()
    checked = CheckedClient(client, lambda source: None, trio.CapacityLimiter(1))
    request = create("/a:/b")
    await far.send_all(request)
    await far.send_eof()
    pieces = [await checked.receive_some(7) for _ in range(len(request) // 7 + 1)]
    assert b"".join(pieces) == request
    assert max(map(len, pieces)) == 7
    assert await checked.receive_some(7) == b""
    assert await checked.receive_some() == b""


# --- the docker CLI ----------------------------------------------------------------------------------


@pytest.fixture
def docker(path: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    program = shutil.which("docker")
    if program is None:
        pytest.skip("there is no docker CLI here")

    def run(*arguments: str) -> tuple[int, str]:
        environment = {
            **os.environ,
            "DOCKER_HOST": f"unix://{path}",
            "DOCKER_CONFIG": str(tmp_path / "config"),
        }
        environment.pop("DOCKER_CONTEXT", None)
        done = subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, timeout=20, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


async def test_the_docker_command_line_shows_the_refusal(
    path: Path, home: Path, docker: Callable[..., tuple[int, str]]
) -> None:
    dockerd = Dockerd()
    bound = ("--mount", "type=bind,dst=/x,src=")
    commands = {
        ("create", "-v", f"{home}:/x", "-v", "volume:/y", "image"): 0,
        ("create", "-v", "/var/run/docker.sock:/var/run/docker.sock", "image"): 0,
        ("create", bound[0], f"{bound[1]}{home}/sub", "image"): 0,
        ("create", "-v", f"{home}/../data:/x", "image"): 1,
        ("create", bound[0], f"{bound[1]}{home.parent}/data", "image"): 1,
        ("run", "-d", "-v", f"{home.parent}/data:/x", "image"): 125,
        ("volume", "create", "-o", "type=none", "-o", "o=bind", "-o", f"device={home.parent}/data", "v"): 1,
    }
    async with forwarding(path, dockerd.serve, home):
        for command, expected in commands.items():
            code, said = await trio.to_thread.run_sync(docker, *command)
            assert code == expected, (command, said)
            refused = f"mounts denied: {home.parent}/data is not shared with the VM" in said
            assert refused == (expected != 0), (command, said)
    assert [head for head in dockerd.heads if b"/create" in head] == [
        b"POST /v1.45/containers/create HTTP/1.1"
    ] * 3
