"""The filter as a script: bytes of a client in, bytes for dockerd and questions out."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.docker_requests import MAX_BLANK, MAX_BODY, MAX_HEAD, RequestFilter, refusal

# What docker 28.2.2 sends for `docker create -v /data/x:/x:ro --mount type=bind,src=/srv/y,dst=/y -v vol:/z busybox`,
# without most of HostConfig's zeros.
PING = b"HEAD /_ping HTTP/1.1\r\nHost: api.moby.localhost\r\nUser-Agent: Docker-Client/28.2.2 (linux)\r\n\r\n"
DOCKER_BODY = (
    b'{"Hostname":"","Domainname":"","User":"","AttachStdin":false,"AttachStdout":true,"AttachStderr":true,'
    b'"Tty":false,"OpenStdin":false,"StdinOnce":false,"Env":null,"Cmd":["true"],"Image":"busybox","Volumes":{},'
    b'"WorkingDir":"","Entrypoint":null,"OnBuild":null,"Labels":{},"HostConfig":{"Binds":["/data/x:/x:ro","vol:/z"],'
    b'"ContainerIDFile":"","LogConfig":{"Type":"","Config":{}},"NetworkMode":"default","PortBindings":{},'
    b'"Devices":[],"DeviceCgroupRules":null,"MemorySwappiness":-1,"Ulimits":[],'
    b'"Mounts":[{"Type":"bind","Source":"/srv/y","Target":"/y"}],"MaskedPaths":null,"ReadonlyPaths":null},'
    b'"NetworkingConfig":{"EndpointsConfig":{"default":{"IPAMConfig":null,"GwPriority":0}}}}\n'
)
DOCKER_CREATE = (
    b"POST /v1.45/containers/create?name=web HTTP/1.1\r\nHost: api.moby.localhost\r\n"
    b"User-Agent: Docker-Client/28.2.2 (linux)\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n"
    % len(DOCKER_BODY)
) + DOCKER_BODY
DOCKER_ATTACH = (
    b"POST /v1.45/containers/abc/attach?stderr=1&stdout=1&stream=1 HTTP/1.1\r\nHost: api.moby.localhost\r\n"
    b"User-Agent: Docker-Client/28.2.2 (linux)\r\nContent-Length: 0\r\nConnection: Upgrade\r\n"
    b"Content-Type: text/plain\r\nUpgrade: tcp\r\n\r\n"
)
DOCKER_VOLUME = (
    b"POST /v1.45/volumes/create HTTP/1.1\r\nHost: api.moby.localhost\r\n"
    b"User-Agent: Docker-Client/28.2.2 (linux)\r\nContent-Length: 87\r\nContent-Type: application/json\r\n\r\n"
    b'{"Driver":"local","DriverOpts":{"device":"/data","o":"bind","type":"none"},"Name":"v"}\n'
)


def request(target: str, body: bytes = b"", *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: docker", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked_request(target: str, *chunks: bytes) -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: docker\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def container(*binds: str, mounts: Any = None) -> bytes:
    return json.dumps({"Image": "x", "HostConfig": {"Binds": list(binds), "Mounts": mounts}}).encode()


def create(*binds: str, mounts: Any = None) -> bytes:
    return request("/containers/create", container(*binds, mounts=mounts))


class Heard:
    """What comes of a client's bytes, when the sources in ``refused`` are refused."""

    def __init__(self, *pieces: bytes, refused: frozenset[str] = frozenset(), end: bool = False) -> None:
        self.passed = b""
        self.asked: list[tuple[str, ...]] = []
        self.filter = RequestFilter()
        for piece in pieces:
            output = self.filter.receive(piece)
            self.passed += output.data
            while output.sources:
                self.asked.append(output.sources)
                output = self.filter.decide(not refused.intersection(output.sources))
                self.passed += output.data
        if end:
            self.passed += self.filter.end()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Heard) and (self.passed, self.asked) == (other.passed, other.asked)

    __hash__ = None  # type: ignore[assignment]


def asked(*pieces: bytes) -> list[tuple[str, ...]]:
    """What is asked of a stream that is allowed everything, and so passes whole."""
    heard = Heard(*pieces)
    assert heard.passed == b"".join(pieces)
    return heard.asked


# --- what is asked ---------------------------------------------------------------------------------


def test_the_docker_command_line_is_understood() -> None:
    assert asked(PING + DOCKER_CREATE) == [("/data/x", "/srv/y")]
    assert asked(DOCKER_VOLUME) == [("/data",)]


def test_a_request_goes_on_only_when_it_is_allowed() -> None:
    connection = RequestFilter()
    output = connection.receive(PING + DOCKER_CREATE + PING)
    assert (output.data, output.sources) == (PING, ("/data/x", "/srv/y"))
    assert connection.decide(True).data == DOCKER_CREATE + PING


def test_nothing_of_a_refused_request_goes_on_and_nothing_after_it() -> None:
    heard = Heard(PING, DOCKER_CREATE + PING, PING, refused=frozenset({"/srv/y"}), end=True)
    assert heard.passed == PING
    assert heard.asked == [("/data/x", "/srv/y")]


@pytest.mark.parametrize(
    "target",
    [
        "/containers/create",
        "/v1.24/containers/create",
        "/v1.51/containers/create?name=a&platform=",
        "http://docker/v1.41/containers/create",
        "http+docker://localhost/v1.41/containers/create",
        "/containers/%63reate",
    ],
)
def test_every_way_to_name_the_endpoint(target: str) -> None:
    expected = [] if target.startswith("http+") else [("/a",)]  # docker-py's own scheme is never on the wire
    assert asked(request(target, container("/a:/b"))) == expected


@pytest.mark.parametrize(
    "other",
    [
        request("/containers/create", container("/a:/b"), method="GET"),
        request("/containers/create/x", container("/a:/b")),
        request("/containers/abc/update", container("/a:/b")),
        request("/x/containers/create", container("/a:/b")),
        request("/volumes/prune", b'{"Driver":"local","DriverOpts":{"o":"bind","device":"/a"}}'),
    ],
)
def test_other_requests_are_not_looked_into(other: bytes) -> None:
    assert asked(other) == []


@pytest.mark.parametrize(
    ("bind", "source"),
    [
        ("/a:/b", "/a"),
        ("/a:/b:ro,z", "/a"),
        ("/with space:/b", "/with space"),
        ("/a/../c:/b", "/a/../c"),
        ("volume:/b", None),
        ("/anonymous", None),
        ("./relative:/b", None),
        ("/a:/b:ro:odd", None),
        (":/b", None),
    ],
)
def test_the_source_of_a_bind(bind: str, source: str | None) -> None:
    assert asked(create(bind)) == ([] if source is None else [(source,)])


LOCAL = {"Name": "local", "Options": {"type": "none", "o": "rw,bind", "device": "/a"}}


@pytest.mark.parametrize(
    ("mount", "source"),
    [
        ({"Type": "bind", "Source": "/a", "Target": "/b", "BindOptions": {"CreateMountpoint": True}}, "/a"),
        ({"Type": "volume", "Source": "/a", "Target": "/b"}, None),
        ({"Type": "tmpfs", "Target": "/b"}, None),
        ({"Type": "bind", "Source": 5}, None),
        ({"Type": "volume", "Source": "v", "VolumeOptions": {"DriverConfig": LOCAL}}, "/a"),
        ({"Type": "volume", "VolumeOptions": {"DriverConfig": {**LOCAL, "Name": ""}}}, "/a"),
        ({"Type": "volume", "VolumeOptions": {"DriverConfig": {**LOCAL, "Name": "nfs"}}}, None),
        ({"Type": "volume", "VolumeOptions": None}, None),
        ("not an object", None),
    ],
)
def test_the_source_of_a_mount(mount: Any, source: str | None) -> None:
    assert asked(create(mounts=[mount])) == ([] if source is None else [(source,)])


@pytest.mark.parametrize(
    ("volume", "source"),
    [
        ({"Driver": "local", "DriverOpts": {"type": "none", "o": "bind", "device": "/a"}}, "/a"),
        ({"DriverOpts": {"type": "none", "o": "rbind,ro", "device": "/a"}}, "/a"),
        ({"Driver": "local", "DriverOpts": {"type": "nfs", "o": "addr=1.2.3.4,rw", "device": ":/a"}}, None),
        ({"Driver": "local", "DriverOpts": {"type": "ext4", "device": "/dev/sdb"}}, None),
        ({"Driver": "plugin", "DriverOpts": {"type": "none", "o": "bind", "device": "/a"}}, None),
        ({"Name": "v"}, None),
    ],
)
def test_the_folder_of_a_volume(volume: Any, source: str | None) -> None:
    body = json.dumps(volume).encode()
    assert asked(request("/v1.45/volumes/create", body)) == ([] if source is None else [(source,)])


@pytest.mark.parametrize(
    "body",
    [
        b' \n{"hostconfig":{"BINDS":["/a:/b"]}}',
        b'{"HostConfig":{"Binds":["/a:/b"]}} trailing',
        b'{"HostConfig":{"Binds":["/a:/b"]},"HostConfig":{"Binds":[]}}',
        b'{"HostConfig":{"Binds":["\\u002fa:/b"]}}',
    ],
)
def test_json_is_read_as_go_reads_it(body: bytes) -> None:
    assert asked(request("/containers/create", body)) == [("/a",)]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"HostConfig":[]}', b'{"HostConfig":{"Binds":{}}}'],
)  # fmt: skip
def test_what_dockerd_will_complain_about_is_left_to_it(body: bytes) -> None:
    assert asked(request("/containers/create", body)) == []


def test_each_source_is_asked_for_once() -> None:
    assert asked(create("/a:/b", "/c:/d", "/a:/e")) == [("/a", "/c")]


def test_a_body_may_come_in_chunks() -> None:
    body = container("/a:/b")
    chunks = [body[:1], body[1:20], body[20:]]
    assert asked(chunked_request("/containers/create", *chunks)) == [("/a",)]


# --- what is held ----------------------------------------------------------------------------------


def test_other_bodies_pass_as_they_come() -> None:
    connection = RequestFilter()
    head, _, _ = chunked_request("/build?t=x").partition(b"0\r\n\r\n")
    assert connection.receive(head).data == head
    for piece in (b"1", b"0\r", b"\nhalf of it"):
        assert connection.receive(piece).data == piece


def test_a_huge_body_is_never_copied_or_kept() -> None:
    connection = RequestFilter()
    size, piece = 1 << 40, bytes(1 << 20)
    head = b"PUT /containers/x/archive HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size
    assert connection.receive(head).data == head
    assert connection.receive(piece).data is piece
    chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
    connection = RequestFilter()
    connection.receive(chunked_request("/build").partition(b"0\r\n\r\n")[0])
    tracemalloc.start()
    try:
        for _ in range(100):
            assert connection.receive(chunk).data is chunk
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("over", [False, True])
def test_a_body_that_is_judged_is_bounded(chunked: bool, over: bool) -> None:
    body = container("/a:/b")
    framing = len(b"400000\r\n\r\n0\r\n\r\n") if chunked else 0
    body += b" " * (MAX_BODY - len(body) - framing + over)
    make = chunked_request if chunked else request
    stream = make("/containers/create", body) + create("/next:/b")
    pieces = [stream[at : at + 65536] for at in range(0, len(stream), 65536)]
    assert asked(*pieces) == ([("/next",)] if over else [("/a",), ("/next",)])
    assert asked(stream) == asked(*pieces)


def test_a_head_is_bounded() -> None:
    room = MAX_HEAD - len(request("/containers/create", b"", "X: "))
    for length, expected in ((room - 10, [("/a",)]), (room + 10, [])):
        stream = request("/containers/create", container("/a:/b"), "X: " + "x" * length)
        pieces = [stream[at : at + 1000] for at in range(0, len(stream), 1000)]
        assert asked(stream) == asked(*pieces) == expected


def test_a_client_that_ends_early_is_passed_on_as_far_as_it_came() -> None:
    for length in range(len(DOCKER_CREATE)):
        heard = Heard(DOCKER_CREATE[:length], end=True)
        assert heard.passed == DOCKER_CREATE[:length]
        assert heard.asked == []


def test_blank_lines_between_requests_are_forgiven() -> None:
    assert asked(create() + b"\r\n" + create("/a:/b")) == [("/a",)]
    assert asked(create() + b"\r\n" * MAX_BLANK + create("/a:/b")) == []


# --- other protocols -------------------------------------------------------------------------------

# Looks like a request, and must not be taken for one.
INPUT = b"\x00\xffPOST /containers/create " + create("/a:/b") + b"GET"


@pytest.mark.parametrize(
    "upgrade",
    [
        DOCKER_ATTACH,
        request("/containers/x/attach"),
        request(
            "/v1.45/exec/e1/start", b'{"Detach":false,"Tty":true}', "Connection: Upgrade", "Upgrade: tcp"
        ),
        request("/exec/e1/start", b'{"Tty":true}'),
        request("/session", b"", "Connection: Upgrade", "Upgrade: h2c"),
        request("/grpc"),
        request("/containers/x/attach/ws", b"", "Connection: keep-alive, Upgrade", method="GET"),
    ],
)
def test_what_follows_an_upgrade_passes_as_it_comes(upgrade: bytes) -> None:
    connection = RequestFilter()
    assert connection.receive(upgrade).data == upgrade
    for at in range(len(INPUT)):
        assert connection.receive(INPUT[at : at + 1]).data == INPUT[at : at + 1]


def test_a_detached_exec_is_no_upgrade() -> None:
    start = request("/v1.45/exec/e1/start", b'{"Detach":true,"Tty":false}')
    assert asked(start + create("/a:/b")) == [("/a",)]


def test_a_container_asked_for_with_an_offer_to_upgrade_is_judged_too() -> None:
    """Java's HTTP client offers h2c with its first request; dockerd may take it."""
    offer = request("/containers/create", container("/a:/b"), "Connection: Upgrade, HTTP2-Settings")
    assert asked(offer + INPUT) == [("/a",)]


@pytest.mark.parametrize(
    "odd",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"hello",
        b"GET\r\n\r\n",
        b"POST /containers/create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /build HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nxyz\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"A" * 17,
        b"\r\n" * MAX_BLANK,
    ],
)
def test_a_stream_that_is_not_understood_passes_as_it_comes(odd: bytes) -> None:
    connection = RequestFilter()
    assert connection.receive(odd).data == odd
    follows = create("/a:/b")
    assert connection.receive(follows).data == follows


# --- every split -----------------------------------------------------------------------------------

ordinary = st.sampled_from(
    [
        PING,
        DOCKER_CREATE,
        DOCKER_VOLUME,
        create("/refused:/x"),
        create("volume:/x"),
        chunked_request("/v1.41/containers/create", container("/a:/b")[:9], container("/a:/b")[9:]),
        chunked_request("/build?t=x", b"POST /containers/create HTTP/1.1\r\n\r\n", b"\r\n" * 7),
        request("/images/load", create("/in a body:/x")),
        request("/exec/e1/start", b'{"Detach":true}'),
        request("/exec/e1/start", b'{"Detach":false}'),
        DOCKER_ATTACH,
        b"\r\n",
        b"GET /events HTTP/1.1\nHost: docker\n\n",
        b"garbage\x00",
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ]
)


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(stream)}), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


@given(
    requests=st.lists(ordinary, max_size=5),
    cuts=st.lists(st.integers(0, 4000), max_size=30),
    allowed=st.booleans(),
)
def test_however_the_bytes_are_split_the_result_is_the_same(
    requests: list[bytes], cuts: list[int], allowed: bool
) -> None:
    stream = b"".join(requests)
    refused = frozenset() if allowed else frozenset({"/refused"})
    whole = Heard(stream, refused=refused, end=True)
    assert Heard(*split(stream, cuts), refused=refused, end=True) == whole
    assert stream.startswith(whole.passed)
    assert whole.passed == stream or ("/refused",) in whole.asked


def test_byte_by_byte() -> None:
    stream = PING + DOCKER_CREATE + DOCKER_VOLUME + chunked_request("/containers/create", container("/a:/b"))
    assert asked(*split(stream, list(range(len(stream))))) == [("/data/x", "/srv/y"), ("/data",), ("/a",)]


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
def test_noise_is_passed_on(noise: bytes, cuts: list[int]) -> None:
    assert Heard(*split(noise, cuts), end=True).passed == noise


# --- the answer ------------------------------------------------------------------------------------


def test_a_refusal_is_an_error_of_the_engine_api() -> None:
    head, _, body = refusal('mounts denied: /ä"b').partition(b"\r\n\r\n")
    assert json.loads(body) == {"message": 'mounts denied: /ä"b'}
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert b"Connection: close" in head.split(b"\r\n")
