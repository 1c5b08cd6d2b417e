"""The host's network in the VM (its names, its resolver, its proxies, whom it trusts), and what else is to run there.

Nothing leaves this machine: the nameserver, the proxy and the servers are this process, on loopback.
"""

from __future__ import annotations

import getpass
import os
import re
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from host_agent import dns_messages
from host_agent.configuration.edit import Change, changed
from host_agent.dns_messages import Code, Malformed, Type, parse
from tests import certificates
from tests.certificates import Certificate
from tests.e2e.harness import Instance, eventually

pytestmark = pytest.mark.vm

NAMES = ("host.agentctl.internal", "host.docker.internal")


class Handler(BaseHTTPRequestHandler):
    """Says what it was asked for; for a proxy that is a whole URL. A registry has nothing here."""

    def do_GET(self) -> None:
        body = f"asked for {self.path}\n".encode()
        self.send_response(404 if self.path.startswith("/v2/x") else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web_server(certificate: Certificate | None = None) -> Iterator[int]:
    """A web server on the host's loopback, with TLS if there is a certificate; its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.path, certificate.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Nameserver:
    """Knows ``addresses``, says nothing of what is ``silent``, and that there is nothing else."""

    socket: socket.socket
    addresses: dict[str, str] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    asked: list[tuple[str, int]] = field(default_factory=list)

    @property
    def port(self) -> int:
        port: int = self.socket.getsockname()[1]
        return port

    def serve(self) -> None:
        while True:
            try:
                message, client = self.socket.recvfrom(4096)
                query = parse(message)
            except TimeoutError:
                continue
            except OSError:
                return
            except Malformed:
                continue
            self.asked.append((query.name, query.kind))
            if query.name in self.silent:
                continue
            address = self.addresses.get(query.name)
            if address is None:
                self.socket.sendto(dns_messages.failure(query, Code.NO_SUCH_NAME), client)
                continue
            found = [address] if query.kind == Type.A else []
            self.socket.sendto(dns_messages.answer(query, found, 60, 512), client)


@pytest.fixture(scope="module")
def nameserver() -> Iterator[Nameserver]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        bound.settimeout(0.5)  # so that the thread notices when it is closed
        server = Nameserver(bound)
        server.addresses["split.test"] = "192.0.2.77"
        server.silent.add("slow.test")
        threading.Thread(target=server.serve, daemon=True).start()
        yield server


@pytest.fixture(scope="module")
def web() -> Iterator[int]:
    with web_server() as port:
        yield port


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificates.make(tmp_path_factory.mktemp("authority"), "host.docker.internal")


@dataclass
class Configured:
    """The instance with a network of its own; ``restore`` takes it away again, for whoever comes next."""

    vm: Instance
    restored: bool = False
    said: str = ""
    """By ``up``."""

    def write(self, **settings: object) -> None:
        path = self.vm.directory / "config.yaml"
        text = path.read_text()
        for key, value in settings.items():
            text = changed(text, Change((key,), value))
        path.write_text(text)

    def restart(self, settings: dict[str, object], **environment: str) -> None:
        """As after a power cut, which takes no time; a stop takes that of the VM's and of the containers' ends."""
        self.vm.guest("sync")
        os.kill(self.vm.status()["qemu_pid"], signal.SIGKILL)
        eventually(lambda: self.vm.processes() == [])
        self.write(**settings)
        self.said = self.vm.agentctl("up", timeout=1200, **environment).stderr.decode()

    def restore(self) -> None:
        if not self.restored:
            self.restored = True
            self.restart(
                {"network": {}, "docker": {}, "environment": {}, "provision": [], "ssh_agent": False}
            )


@pytest.fixture(scope="module")
def ssh_agent() -> Iterator[str]:
    """Where something listens that says it is one."""
    with tempfile.TemporaryDirectory(prefix="ac-") as folder, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{folder}/agent")
        bound.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = bound.accept()
                except OSError:
                    return
                with client:
                    client.sendall(b"an agent")

        threading.Thread(target=serve, daemon=True).start()
        yield f"{folder}/agent"
        bound.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def configured(
    vm: Instance, image: str, nameserver: Nameserver, web: int, authority: Certificate, ssh_agent: str
) -> Iterator[Configured]:
    instance = Configured(vm)
    network: dict[str, object] = {
        "dns": [f"127.0.0.1:{nameserver.port}"],
        "hosts": {"db.test": "192.0.2.7", "app.test": "127.0.0.1"},
        "ca_certificates": [str(authority.path)],
    }
    settings = {
        "network": network,
        "docker": {"registry-mirrors": ["https://one.test"], "log-opts": {"max-size": "5m"}},
        "environment": {"GREETING": 'say "hi" #1'},
        "provision": [
            {"script": "echo $(id -un) $GREETING $(docker version -f ok) >>/run/provisioned; exit 3"},
            {"mode": "user", "script": "id -un; echo to whom it concerns >&2"},
        ],
        "ssh_agent": True,
    }
    proxy = f"http://localhost:{web}"
    instance.restart(settings, http_proxy=proxy, no_proxy=".corp.test", SSH_AUTH_SOCK=ssh_agent)
    yield instance
    instance.restore()


def in_container(vm: Instance, script: str, *options: str) -> str:
    """What busybox's shell says in a container of its own. Starting one takes 6 s under emulation."""
    return vm.docker("run", "--rm", *options, "hello", "/bin/sh", "-c", f"PATH=/bin; busybox {script}")


def wget_all(port: int) -> str:
    return "; busybox ".join(f"wget -T 30 -qO- http://{name}:{port}/x" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_hosts_loopback_from_the_guest(vm: Instance, web: int, name: str) -> None:
    assert vm.guest(f"curl -sS http://{name}:{web}/x") == "asked for /x\n"


def test_the_hosts_loopback_from_a_container(vm: Instance, image: str, web: int) -> None:
    gate = ("--add-host", "gate.test:host-gateway")  # as compose files have it
    said = in_container(vm, f"{wget_all(web)}; busybox wget -T 30 -qO- http://gate.test:{web}/y", *gate)
    assert said.splitlines() == ["asked for /x", "asked for /x", "asked for /y"]


def test_from_a_network_of_the_users_where_docker_answers_for_names(
    vm: Instance, image: str, web: int
) -> None:
    vm.docker("network", "create", "names")
    try:
        said = in_container(vm, wget_all(web), "--network", "names")
        assert said.splitlines() == ["asked for /x", "asked for /x"]
    finally:
        vm.docker("network", "rm", "names")


def test_while_an_image_is_built(vm: Instance, image: str, web: int, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM {image}\nRUN /bin/busybox wget -qO /www/got http://host.docker.internal:{web}/x\n"
    )
    vm.docker("build", "-q", "-t", "names", str(tmp_path))
    assert vm.docker("run", "--rm", "names", "/bin/busybox", "cat", "/www/got") == "asked for /x"


def test_names_of_the_host_and_of_the_configuration(configured: Configured, web: int) -> None:
    vm = configured.vm
    names = {"split.test": "192.0.2.77", "db.test": "192.0.2.7", "app.test": "10.0.2.2"}
    found = in_container(vm, "; busybox ".join(f"nslookup {name}" for name in names))
    for name, address in names.items():
        assert vm.guest(f"getent ahostsv4 {name}").split()[:1] == [address]
        assert f"Name:\t{name}\nAddress: {address}\n" in found
    assert vm.guest("getent hosts nothing.test || echo none") == "none\n"
    # 127.0.0.1 in the host's list is the host's.
    assert vm.guest(f"curl -sS --noproxy '*' http://app.test:{web}/x") == "asked for /x\n"


def test_a_name_that_moves_is_found_where_it_is(configured: Configured, nameserver: Nameserver) -> None:
    for address in ("192.0.2.78", "192.0.2.79"):
        nameserver.addresses["moving.test"] = address
        assert configured.vm.guest("getent ahostsv4 moving.test").split()[:1] == [address]


def test_other_types_reach_the_nameserver(configured: Configured, nameserver: Nameserver) -> None:
    configured.vm.guest("busybox nslookup -type=mx split.test", check=False)
    assert ("split.test", 15) in nameserver.asked


def test_a_nameserver_that_says_nothing_hangs_nobody(configured: Configured) -> None:
    started = time.monotonic()
    assert "none" in configured.vm.guest("getent hosts slow.test || echo none")
    # 2 families together, tried twice, each within 4 s.
    assert time.monotonic() - started < 30
    assert configured.vm.guest("getent ahostsv4 split.test").split()[:1] == ["192.0.2.77"]


def test_names_are_found_again_when_the_host_agent_was_killed(configured: Configured) -> None:
    vm = configured.vm
    killed = vm.status()["agent_pid"]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: vm.status()["guest_connected"] and vm.status()["agent_pid"] != killed)
    eventually(lambda: "192.0.2.7" in vm.guest("getent ahostsv4 db.test", check=False), 30)


def test_proxies_reach_logins_docker_and_not_what_is_near(configured: Configured, web: int) -> None:
    vm = configured.vm
    proxy = f"http://10.0.2.2:{web}"
    assert vm.guest("echo $http_proxy $HTTP_PROXY") == f"{proxy} {proxy}\n"
    assert vm.guest("su -s /bin/sh -l nobody -c 'echo $http_proxy'").strip() == proxy
    assert vm.docker("info", "--format", "{{.HTTPProxy}}") == proxy
    assert ".corp.test" in vm.docker("info", "--format", "{{.NoProxy}}").split(",")
    # Whoever installs packages.
    assert vm.agentctl("exec", "sudo", "printenv", "http_proxy").stdout.decode().strip() == proxy
    # Through the proxy, which is asked for a URL; and past it.
    assert vm.guest("curl -sS http://far.test/x") == "asked for http://far.test/x\n"
    assert vm.guest(f"curl -sS http://host.docker.internal:{web}/x") == "asked for /x\n"
    assert "127.0.0.1" in vm.guest("echo $no_proxy")


def test_who_is_trusted_here_is_trusted_there(
    configured: Configured, authority: Certificate, tmp_path: Path
) -> None:
    vm = configured.vm
    with web_server(authority) as port:
        url = f"https://host.docker.internal:{port}/x"
        assert vm.guest(f"curl -sS {url}") == "asked for /x\n"
        script = f"import urllib.request as u; print(u.urlopen('{url}').read().decode(), end='')"
        assert vm.guest(f'python3 -c "{script}"') == "asked for /x\n"
        # Docker gets as far as to hear that there is no such image.
        answer = vm.agentctl(
            "exec", "-u", "root", "docker", "pull", f"host.docker.internal:{port}/x:y", check=False
        )
        assert answer.returncode != 0
        assert b"x509" not in answer.stderr
        assert b"certificate" not in answer.stderr
    with web_server(certificates.make(tmp_path, "host.docker.internal")) as port:
        refused = vm.guest(f"curl -sS https://host.docker.internal:{port}/x 2>&1; echo $?")
        assert refused.endswith("60\n"), refused  # curl(1): the peer cannot be authenticated


ASK_AGENT = "import os, socket as s; c = s.socket(s.AF_UNIX); c.connect(os.environ['SSH_AUTH_SOCK']); print(c.recv(99))"


def test_what_is_to_run_in_the_vm_runs(configured: Configured) -> None:
    vm = configured.vm
    assert vm.guest("cat /run/provisioned; echo $GREETING") == 'root say "hi" #1 ok\nsay "hi" #1\n'
    failure = "provision script 1 failed with exit status 3"
    assert f"warning: {failure} (see: agentctl logs --component provision)" in configured.said
    assert "provision script 2: to whom it concerns\n" in configured.said
    log = vm.agentctl("logs", "--component", "provision").stdout.decode()
    assert re.search(rf"provision script 2: {getpass.getuser()}\n", log)
    assert [failure in warning for warning in vm.status()["warnings"]] == [True]
    assert vm.agentctl("exec", "python3", "-c", ASK_AGENT).stdout == b"b'an agent'\n"


def test_dockers_settings_change_while_it_runs_and_nonsense_does_not(configured: Configured) -> None:
    vm = configured.vm
    mirrors = ("info", "--format", "{{.RegistryConfig.Mirrors}}")
    assert vm.docker(*mirrors) == "[https://one.test/]"
    started = vm.guest("systemctl show docker -p ExecMainStartTimestampMonotonic")
    configured.write(docker={"registry-mirrors": ["https://two.test"], "log-opts": {"max-size": "5m"}})
    assert b"containers run on" in vm.agentctl("up").stderr
    assert vm.docker(*mirrors) == "[https://two.test/]"
    configured.write(docker={"registry-mirrrors": []})
    assert b"Docker does not take these settings" in vm.agentctl("up").stderr
    assert vm.docker(*mirrors) == "[https://two.test/]"
    assert vm.guest("systemctl show docker -p ExecMainStartTimestampMonotonic") == started


def test_what_the_host_takes_back_the_vm_forgets(configured: Configured, authority: Certificate) -> None:
    vm = configured.vm
    configured.restore()
    assert vm.guest("env | grep -i proxy; cat /etc/environment", check=False) == ""
    assert vm.docker("info", "--format", "{{.HTTPProxy}}") == ""
    assert vm.guest("getent hosts db.test || echo none") == "none\n"
    with web_server(authority) as port:
        assert vm.guest(f"curl -sS https://host.docker.internal:{port}/x 2>&1; echo $?").endswith("60\n")
