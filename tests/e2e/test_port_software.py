"""Real programs in containers, as Debian packages them, published with ``-p``: reached from the host as within the VM."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from tests.e2e.harness import Instance, eventually, fetch, is_refused
from tests.e2e.software import make_image, unpack
from tests.free_ports import free_port

pytestmark = pytest.mark.vm

PACKAGES = ("nginx-light", "dnsmasq-base", "iperf3")
KEPT = ("./usr/bin/iperf3", "./usr/sbin/", "./usr/lib/", "./usr/lib64/", "./var/lib/nginx", "./var/log/nginx")
PAGE = b"hello from nginx\n"
NGINX = b"""
user root; daemon off; error_log stderr; pid /run/nginx.pid;
events {}
http { access_log off; server { listen 80; listen [::]:80; root /www; } }
"""
FILES = {
    "etc/passwd": b"root:x:0:0:root:/:/none\n",
    "etc/group": b"root:x:0:\n",
    "etc/nginx.conf": NGINX,
    "www/index.html": PAGE,
    "run/.keep": b"",
    "tmp/.keep": b"",
}
#: What DNS servers of ours answer (TEST-NET-1, RFC 5737).
ANSWER = "192.0.2.7"
DNSMASQ = (
    "/usr/sbin/dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--no-resolv",
    "--no-hosts", "--user=root", "--group=root", f"--address=/answer.test/{ANSWER}",
)  # fmt: skip


@pytest.fixture(scope="module")
def software(vm: Instance) -> str:
    """An image with all of them; its command is nginx."""
    command = 'CMD ["/usr/sbin/nginx","-c","/etc/nginx.conf"]'
    return make_image(vm, "software", unpack(*PACKAGES), KEPT, files=FILES, command=command)


@contextmanager
def container(vm: Instance, *words: str) -> Iterator[str]:
    """One that is there for the block; ``words`` are those of ``docker run``."""
    name = vm.docker("run", "-d", *words)
    try:
        yield name
    finally:
        vm.docker("rm", "-f", name)


class Inside:
    """curl as the VM itself runs it, in one shell for all."""

    def __init__(self, shell: subprocess.Popen[bytes]) -> None:
        assert shell.stdin is not None
        assert shell.stdout is not None
        self._stdin, self._stdout = shell.stdin, shell.stdout

    def curl(self, port: int) -> bytes:
        """The first line of the page; empty if there is no answer."""
        command = f"curl -sS --max-time 20 http://127.0.0.1:{port}/ 2>/dev/null | head -n 1; echo end\n"
        self._stdin.write(command.encode())
        self._stdin.flush()
        lines = list(iter(self._stdout.readline, b"end\n"))
        return lines[0] if lines else b""


@contextmanager
def inside(vm: Instance) -> Iterator[Inside]:
    with vm.popen("exec", "sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        yield Inside(shell)
        assert shell.stdin is not None
        shell.stdin.close()


def resolve(port: int, host: str = "127.0.0.1", *, tcp: bool = False) -> str:
    """The address that a DNS server has for answer.test (RFC 1035); "" if it does not answer within 2 s."""
    question = b"\x06answer\x04test\x00" + struct.pack(">HH", 1, 1)
    query = struct.pack(">HHHHHH", 4711, 0x0100, 1, 0, 0, 0) + question
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        try:
            client.connect((host, port))
            client.sendall(struct.pack(">H", len(query)) + query if tcp else query)
            answer = client.recv(2)[:0] + client.recv(512) if tcp else client.recv(512)
        except OSError:
            return ""
    if len(answer) < len(query) + 16 or answer[:2] != query[:2]:
        return ""
    return socket.inet_ntoa(answer[len(query) + 12 : len(query) + 16])


def owners(vm: Instance, port: int) -> set[tuple[str, str, str]]:
    return {
        (row["proto"], row["process"], row["container"]) for row in vm.ports() if row["guest_port"] == port
    }


def test_nginx_comes_and_goes_with_its_container(
    vm: Instance, software: str, request: pytest.FixtureRequest
) -> None:
    """What counts as success is the answer that curl gets inside the VM: the host gets the same."""
    cycles = 100 if request.config.getoption("--long") else 10
    port = free_port()
    with container(vm, "--name", "web", "-p", f"{port}:80", software), inside(vm) as guest:
        assert eventually(lambda: guest.curl(port)) == PAGE
        assert fetch(port) == PAGE
        assert fetch(port, "::1") == PAGE
        assert owners(vm, port) == {("tcp", "nginx", "web")}
        assert "nginx (container web)" in vm.agentctl("ports").stdout.decode()
        for _ in range(cycles):
            vm.docker("stop", "web")
            eventually(lambda: is_refused(port) and is_refused(port, "::1"), timeout=5)
            assert guest.curl(port) == b""
            vm.docker("start", "web")
            assert eventually(lambda: guest.curl(port), timeout=20) == PAGE
            assert eventually(lambda: fetch(port), timeout=2) == PAGE
    eventually(lambda: is_refused(port))


def test_a_dns_server_answers_by_udp_and_tcp(vm: Instance, software: str) -> None:
    port = free_port()
    published = ["-p", f"{port}:53/udp", "-p", f"{port}:53/tcp", "--name", "names"]
    with container(vm, *published, software, *DNSMASQ):
        assert eventually(lambda: resolve(port)) == ANSWER
        assert resolve(port, "::1") == ANSWER
        assert eventually(lambda: resolve(port, tcp=True)) == ANSWER
        assert [resolve(port) for _ in range(50)] == [ANSWER] * 50
        assert owners(vm, port) == {("udp", "dnsmasq", "names"), ("tcp", "dnsmasq", "names")}


def iperf(port: int, *words: str) -> dict[str, Any]:
    """The sums of a run of two seconds; empty if the server is not there, or still at another one."""
    command = ["iperf3", "--json", "--client", "127.0.0.1", "--port", str(port), "--time", "2", *words]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    result: dict[str, Any] = json.loads(done.stdout)
    end: dict[str, Any] = result["end"] if done.returncode == 0 else {}
    return end


@pytest.mark.parametrize("network", [[], ["--network", "host"]], ids=["published", "host network"])
def test_iperf3(vm: Instance, software: str, network: list[str]) -> None:
    port = free_port()
    # Its server binds UDP once a client has come, which sends at once: with the guest's own network the port must be
    # there already.
    static = f"{port}:{port}/udp"
    vm.agentctl("forward", "add", "--static", static)
    place = network or ["-p", f"{port}:{port}/tcp", "-p", f"{port}:{port}/udp"]
    with container(
        vm, "--name", "meter", *place, software, "/usr/bin/iperf3", "--server", "--port", str(port)
    ):
        # Not asked whether it answers: it would take that for its client.
        eventually(lambda: ("tcp", "iperf3", "meter") in owners(vm, port))
        for name, words in (("to", []), ("from", ["--reverse"]), ("to, 8 streams", ["--parallel", "8"])):
            summary = eventually(partial(iperf, port, *words), interval=0.5)["sum_received"]
            print(f"iperf3 {name} the VM: {summary['bits_per_second'] / 8e6:.0f} MB/s")
            assert summary["bytes"] > 1 << 20
        datagrams = ["--udp", "--bitrate", "2M", "--length", "1200"]
        summary = eventually(partial(iperf, port, *datagrams), interval=0.5)["sum"]
        print(f"iperf3 --udp: {summary['lost_packets']} of {summary['packets']} lost")
        # How many are lost is the machine's to say; that a conversation goes on is ours.
        assert summary["packets"] - summary["lost_packets"] > 100
    vm.agentctl("forward", "rm", static)
