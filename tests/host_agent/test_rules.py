"""Which listeners of the guest are forwarded, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from host_agent.rules import Decision, Forwarding, Ignored, decide
from protocol.api import Listener, Proto


def tcp(address: str, port: int, unit: str = "") -> Listener:
    return Listener(Proto.TCP, address, port, unit)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "0.0.0.0", "::1", "::", "172.17.0.1", "127.0.0.53", "fd00::7"]
)
def test_a_listener_on_any_address_gets_the_same_port_on_the_host(address: str) -> None:
    assert decide(tcp(address, 8080)) == Forwarding(8080)


@pytest.mark.parametrize(
    "unit",
    [
        "ssh.service",
        "ssh.socket",
        "ssh@3-10.0.2.15:22-10.0.2.2:4711.service",
        "containerd.service",
        "systemd-resolved.service",
        "systemd-networkd.service",
        "agentctl-data.service",
    ],
)
def test_the_daemons_of_the_vm_stay_inside_and_the_reason_is_said(unit: str) -> None:
    decision = decide(tcp("0.0.0.0", 22, unit))
    assert isinstance(decision, Ignored)
    assert decision.reason


@pytest.mark.parametrize(
    "unit",
    [
        "docker.service",  # the proxies of published ports
        "docker-4f9d2c.scope",  # a container on the host network
        "session-3.scope",  # what a user starts, `ssh -R` included
        "agentctl-agent.service",  # what a user starts with `agentctl exec`
        "nginx.service",
        "containerd.service.d",
        "",
    ],
)
def test_everything_else_is_forwarded(unit: str) -> None:
    assert decide(tcp("0.0.0.0", 22, unit)) == Forwarding(22)


def test_udp_is_not_forwarded() -> None:
    assert decide(Listener(Proto.UDP, "0.0.0.0", 53)) == Ignored("UDP is not forwarded")


@pytest.mark.parametrize("port", [-1, 0, 65536, 2**63])
def test_a_port_that_cannot_be_is_ignored(port: int) -> None:
    assert decide(tcp("0.0.0.0", port)) == Ignored("not a valid port")


@pytest.mark.parametrize("address", ["", "localhost", "0.0.0.0.0", "1.2.3.4\x1b[2J", "[::1]", "*"])
def test_an_address_that_is_not_numeric_is_ignored(address: str) -> None:
    assert decide(tcp(address, 80)) == Ignored("not a numeric address")


@dataclass(frozen=True)
class Move:
    """A rule about one port, as a configured one may be."""

    port: int
    decision: Decision

    def decide(self, listener: Listener) -> Decision | None:
        return self.decision if listener.port == self.port else None


def test_the_first_rule_with_an_opinion_wins() -> None:
    rules = [Move(80, Forwarding(10080)), Move(80, Ignored("second")), Move(81, Ignored("third"))]
    assert decide(tcp("::", 80), rules) == Forwarding(10080)
    assert decide(tcp("::", 81), rules) == Ignored("third")


def test_a_listener_that_no_rule_mentions_is_ignored() -> None:
    assert decide(tcp("::", 82), [Move(80, Forwarding(1))]) == Ignored("no rule matches")
