"""What a session's guest is told, with a link that a test scripts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from host_agent import dns_server
from host_agent.host_network import MAX_PROBLEMS, NOT_USED, HostNetwork
from host_agent.network_settings import NetworkSettings, from_json
from protocol.api import HostNetworkUsed, UseHostNetwork
from protocol.errors import ErrorCode, LinkError, RpcError
from protocol.link import Link
from tests import certificates
from tests.host_agent.dns_client import ask, read


class ScriptedLink:
    def __init__(self, outcome: HostNetworkUsed | Exception) -> None:
        self.outcome = outcome
        self.told: list[UseHostNetwork] = []

    async def request(self, message: UseHostNetwork, *, timeout: float) -> HostNetworkUsed:
        await trio.lowlevel.checkpoint()
        self.told.append(message)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Told:
    """What the guest was told, and the user."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    async def by(
        self,
        nursery: trio.Nursery,
        settings: NetworkSettings,
        environment: dict[str, str],
        outcome: HostNetworkUsed | Exception | None = None,
    ) -> UseHostNetwork:
        network = HostNetwork(settings, "vm", lambda *words: self.said.append(words), environment)
        await nursery.start(network.run)
        link = ScriptedLink(outcome or HostNetworkUsed())
        network.link_up(cast(Link, link))
        with trio.fail_after(10):
            while not link.told:
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.01)
        return link.told[0]


@pytest.fixture
def told() -> Told:
    return Told()


async def test_a_guest_is_told_all_of_it(nursery: trio.Nursery, told: Told, tmp_path: Path) -> None:
    authority = certificates.make(tmp_path, "ca.test")
    settings = from_json({"ca_certificates": [str(authority.path)]})
    environment = {"https_proxy": "http://localhost:3128", "PATH": "/bin", "NO_PROXY": ".corp"}
    request = await told.by(nursery, settings, environment)
    assert (request.name_server, request.host) == ("10.0.2.3", "10.0.2.2")
    direct = "localhost,127.0.0.1,::1,vm,10.0.2.15,host.agentctl.internal,host.docker.internal,10.0.2.2"
    assert request.environment == {
        "https_proxy": "http://10.0.2.2:3128",
        "HTTPS_PROXY": "http://10.0.2.2:3128",
        "no_proxy": f".corp,{direct}",
        "NO_PROXY": f".corp,{direct}",
    }
    assert request.certificates == [authority.der]
    assert told.said == []
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        await client.connect(("127.0.0.1", request.dns_port))
        await client.send(ask("host.docker.internal", 1))
        with trio.fail_after(10):
            assert read(await client.recv(512)).addresses == ["10.0.2.2"]


@pytest.mark.parametrize(
    ("proxies", "passed_on"),
    [
        ("environment", "http://p:1"),
        ("none", None),
        ({"http_proxy": "http://127.0.0.1:2"}, "http://10.0.2.2:2"),
    ],
)
async def test_whose_proxies(nursery: trio.Nursery, told: Told, proxies: Any, passed_on: str | None) -> None:
    settings = from_json({"proxies": proxies, "ca_certificates": []})
    request = await told.by(nursery, settings, {"http_proxy": "http://p:1"})
    assert request.environment.get("HTTP_PROXY") == passed_on
    assert bool(request.environment) == (passed_on is not None)


async def test_what_cannot_be_had_is_said(nursery: trio.Nursery, told: Told, tmp_path: Path) -> None:
    settings = from_json({"ca_certificates": [str(tmp_path / "none.pem")]})
    outcome = HostNetworkUsed(["the VM does not use it: why"])
    request = await told.by(nursery, settings, {"http_proxy": "not a\nproxy"}, outcome)
    assert (request.environment, request.certificates) == ({}, [])
    assert [kind for kind, _ in told.said] == ["network"] * 3
    messages = [message for _, message in told.said]
    assert messages[0].startswith("http_proxy was not passed on")
    assert messages[1].startswith(f"the VM does not trust {tmp_path}/none.pem: No such file")
    assert messages[2] == "the VM does not use it: why"


async def test_a_guest_that_refuses_one_that_goes_and_a_bug(nursery: trio.Nursery, told: Told) -> None:
    settings = from_json({"ca_certificates": []})
    await told.by(nursery, settings, {}, RpcError(ErrorCode.UNSUPPORTED, "no such request"))
    await told.by(nursery, settings, {}, LinkError("it has gone"))
    await told.by(nursery, settings, {}, ValueError("a bug"))
    assert told.said == [
        ("network", f"{NOT_USED}: no such request"),
        ("network", f"{NOT_USED}: an error of agentctl's, see: agentctl logs"),
    ]


async def test_a_guest_that_says_much_is_cut_short(nursery: trio.Nursery, told: Told) -> None:
    await told.by(nursery, from_json({"ca_certificates": []}), {}, HostNetworkUsed(["x" * 100_000] * 1000))
    assert len(told.said) == MAX_PROBLEMS
    assert all(len(message) < 5000 for _, message in told.said)


async def test_without_a_port_the_guest_asks_qemu(
    nursery: trio.Nursery, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_server, "ADDRESS", "192.0.2.1")  # nobody's
    request = await told.by(nursery, from_json({"ca_certificates": []}), {})
    assert request.dns_port == 0
    ((kind, message),) = told.said
    assert (kind, message.partition(": ")[0]) == ("network", "the VM asks QEMU for names")
