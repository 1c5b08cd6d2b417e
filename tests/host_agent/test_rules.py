"""Which listeners of the guest are forwarded, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from host_agent import rules
from host_agent.rules import (
    EVERYWHERE,
    LOCALHOST,
    Decision,
    Forwarding,
    HostAddress,
    HostSocket,
    Ignored,
    InvalidRule,
    Static,
    check,
    check_settings,
    complete,
    decide,
    statics,
)
from protocol.api import Listener, PortRule, PortSettings, Proto


def tcp(address: str, port: int, unit: str = "") -> Listener:
    return Listener(Proto.TCP, address, port, unit)


def to(port: int, address: str = LOCALHOST) -> Forwarding:
    return Forwarding(HostAddress(Proto.TCP, address, port))


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "0.0.0.0", "::1", "::", "172.17.0.1", "127.0.0.53", "fd00::7"]
)
def test_a_listener_on_any_address_gets_the_same_port_on_the_host(address: str) -> None:
    assert decide(tcp(address, 8080)) == to(8080)


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
    assert decide(tcp("0.0.0.0", 22, unit)) == to(22)


def test_a_server_for_datagrams_is_forwarded_as_well() -> None:
    assert decide(Listener(Proto.UDP, "0.0.0.0", 53)) == Forwarding(HostAddress(Proto.UDP, LOCALHOST, 53))
    dhcp = Listener(Proto.UDP, "10.0.2.15", 68, "systemd-networkd.service")
    assert decide(dhcp) == Ignored("a daemon of the VM itself")


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
    listed = [Move(80, to(10080)), Move(80, Ignored("second")), Move(81, Ignored("third"))]
    assert decide(tcp("::", 80), listed) == to(10080)
    assert decide(tcp("::", 81), listed) == Ignored("third")


def test_a_listener_that_no_rule_mentions_is_ignored() -> None:
    assert decide(tcp("::", 82), [Move(80, to(1))]) == Ignored("no rule matches")


# --- the user's rules ------------------------------------------------------------------------------

ZERO = {"guest_ip": "0.0.0.0", "guest_ip_must_be_zero": True}
ANY = {"guest_ip": "0.0.0.0", "guest_ip_must_be_zero": False}


def rule(**values: object) -> PortRule:
    """A rule that moves port 80 to 8080, but for what ``values`` says."""
    made = PortRule(**{"guest_port": 80, "ports": 1, "host_port": 8080, **values})  # type: ignore[arg-type]
    check(made)
    return made


def after(*listed: PortRule, **settings: object) -> tuple[rules.Rule, ...]:
    return complete(PortSettings(list(listed), **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "bound", "matches"),
    [
        # The address of a rule is 127.0.0.1 by default, and that is reached by who listens on all.
        ({}, "127.0.0.1", True),
        ({}, "0.0.0.0", True),
        ({}, "::", True),
        ({}, "::1", True),
        ({}, "::ffff:127.0.0.1", True),
        ({}, "127.0.0.2", False),
        ({}, "172.17.0.1", False),
        ({}, "fd00::7", False),
        # Another address is only that one, or all.
        ({"guest_ip": "172.17.0.1"}, "172.17.0.1", True),
        ({"guest_ip": "172.17.0.1"}, "0.0.0.0", True),
        ({"guest_ip": "172.17.0.1"}, "::", True),
        ({"guest_ip": "172.17.0.1"}, "127.0.0.1", False),
        ({"guest_ip": "172.17.0.1"}, "::1", False),
        ({"guest_ip": "::1"}, "::1", True),
        ({"guest_ip": "::1"}, "127.0.0.1", False),
        ({"guest_ip": "fd00:0::7"}, "fd00::7", True),
        # All addresses: only who listens on all, or everybody.
        (ZERO, "0.0.0.0", True),
        (ZERO, "::", True),
        (ZERO, "127.0.0.1", False),
        (ZERO, "::1", False),
        (ZERO, "172.17.0.1", False),
        (ANY, "0.0.0.0", True),
        (ANY, "::", True),
        (ANY, "127.0.0.1", True),
        (ANY, "::1", True),
        (ANY, "172.17.0.1", True),
        (ANY, "fd00::7", True),
        # The protocol.
        ({"proto": Proto.TCP}, "0.0.0.0", True),
        ({"proto": Proto.UDP}, "0.0.0.0", False),
    ],
)
def test_which_addresses_a_rule_matches(values: dict[str, object], bound: str, matches: bool) -> None:
    assert decide(tcp(bound, 80), after(rule(**values))) == (to(8080) if matches else to(80))


@pytest.mark.parametrize(
    ("values", "bound", "ignored"),
    [
        ({}, "127.0.0.1", True),
        ({}, "::1", True),
        ({}, "172.17.0.1", False),
        # To ignore one address does not block who listens on all of them.
        ({}, "0.0.0.0", False),
        ({}, "::", False),
        ({"guest_ip": "172.17.0.1"}, "0.0.0.0", False),
        (ZERO, "0.0.0.0", True),
        (ZERO, "::", True),
        (ZERO, "127.0.0.1", False),
        (ANY, "0.0.0.0", True),
        (ANY, "127.0.0.1", True),
        (ANY, "172.17.0.1", True),
    ],
)
def test_what_a_rule_ignores(values: dict[str, object], bound: str, ignored: bool) -> None:
    expected = Ignored("rule 2 says so") if ignored else to(80)
    assert decide(tcp(bound, 80), after(rule(guest_port=1), rule(ignore=True, **values))) == expected


@pytest.mark.parametrize(
    ("port", "host_port"), [(7999, 7999), (8000, 9000), (8005, 9005), (8010, 9010), (8011, 8011)]
)
def test_a_range_goes_to_one_of_the_same_length(port: int, host_port: int) -> None:
    moved = rule(guest_port=8000, ports=11, host_port=9000)
    assert decide(tcp("0.0.0.0", port), after(moved)) == to(host_port)


@pytest.mark.parametrize(
    ("host_ip", "address"),
    [
        ("localhost", LOCALHOST),
        ("127.0.0.1", LOCALHOST),
        ("::1", LOCALHOST),
        ("0.0.0.0", EVERYWHERE),
        ("::", EVERYWHERE),
        ("192.168.1.7", "192.168.1.7"),
        ("127.0.0.2", "127.0.0.2"),
        ("FD00:0::7", "fd00::7"),
    ],
)
def test_where_on_the_host(host_ip: str, address: str) -> None:
    assert decide(tcp("0.0.0.0", 80), after(rule(host_ip=host_ip))) == to(8080, address)


def test_a_port_may_be_a_socket_of_the_host() -> None:
    listed = after(rule(host_socket="/run/user/1000/web.sock"))
    assert decide(tcp("0.0.0.0", 80), listed) == Forwarding(HostSocket("/run/user/1000/web.sock"))


def test_the_first_rule_that_matches_wins() -> None:
    listed = after(rule(guest_ip="127.0.0.2"), rule(host_port=1234), rule(ignore=True, **ANY), rule())
    assert decide(tcp("127.0.0.1", 80), listed) == to(1234)
    assert decide(tcp("172.17.0.1", 80), listed) == Ignored("rule 3 says so")
    assert decide(tcp("127.0.0.2", 80), listed) == to(8080)


def test_no_rule_brings_out_the_ssh_server_and_any_may_bring_out_another_daemon() -> None:
    listed = after(PortRule(ports=65535, **ANY))  # type: ignore[arg-type]
    assert isinstance(decide(tcp("0.0.0.0", 22, "ssh.service"), listed), Ignored)
    assert decide(tcp("127.0.0.53", 53, "systemd-resolved.service"), listed) == to(53)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0", EVERYWHERE),
        ("::", EVERYWHERE),
        ("127.0.0.1", LOCALHOST),
        ("::1", LOCALHOST),
        ("10.0.2.15", LOCALHOST),
    ],
)
@pytest.mark.parametrize("unit", ["docker.service", "agentctl-agent.service"])
def test_one_setting_opens_to_the_lan_who_listens_on_all_addresses(
    address: str, expected: str, unit: str
) -> None:
    assert decide(tcp(address, 8080, unit), after(lan=True)) == to(8080, expected)
    assert decide(tcp(address, 8080, unit), after(lan=False)) == to(8080)
    assert isinstance(decide(tcp(address, 22, "ssh.socket"), after(lan=True)), Ignored)


@pytest.mark.parametrize(
    ("port", "host_port"), [(1, 10001), (80, 10080), (1023, 11023), (1024, 1024), (8080, 8080)]
)
def test_privileged_ports_may_be_moved_together(port: int, host_port: int) -> None:
    listed = after(rule(guest_port=443, host_port=443), privileged_offset=10000)
    assert decide(tcp("0.0.0.0", port), listed) == to(host_port)
    assert decide(tcp("0.0.0.0", 443), listed) == to(443), "a rule says what it says"


def test_a_static_rule_is_open_without_a_listener() -> None:
    listed = [
        rule(),
        rule(proto=Proto.TCP, guest_port=8000, ports=2, host_port=9000, static=True, host_ip="::", **ANY),
        rule(static=True),
        rule(guest_port=81, static=True, host_socket="/run/web.sock"),
    ]
    assert list(statics(PortSettings(listed))) == [
        Static(HostAddress(Proto.TCP, EVERYWHERE, 9000), Proto.TCP, "0.0.0.0", 8000),
        Static(HostAddress(Proto.TCP, EVERYWHERE, 9001), Proto.TCP, "0.0.0.0", 8001),
        Static(HostAddress(Proto.TCP, LOCALHOST, 8080), Proto.TCP, "127.0.0.1", 80),
        Static(HostAddress(Proto.UDP, LOCALHOST, 8080), Proto.UDP, "127.0.0.1", 80),
        Static(HostSocket("/run/web.sock"), Proto.TCP, "127.0.0.1", 81),
    ]


def test_a_socket_of_the_host_is_not_for_datagrams() -> None:
    listed = after(rule(host_socket="/run/web.sock"))
    udp = Listener(Proto.UDP, "0.0.0.0", 80)
    assert decide(udp, listed) == Forwarding(HostAddress(Proto.UDP, LOCALHOST, 80))


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        ({"guest_ip": "somewhere"}, "guest_ip", "is 'somewhere', which is not a numeric address"),
        ({"guest_ip_must_be_zero": True}, "guest_ip_must_be_zero", "is true, and guest_ip is 127.0.0.1"),
        ({"guest_port": 0}, "guest_port", "is 0; ports are 1-65535"),
        ({"guest_port": 65536}, "guest_port", "is 65536; ports are 1-65535"),
        ({"guest_port": 65530, "ports": 10}, "guest_port", "is 65530-65539; ports are 1-65535"),
        ({"ports": 0}, "guest_port", "is 80-79; ports are 1-65535"),
        ({"host_port": 65535, "ports": 2}, "host_port", "is 65535-65536; ports are 1-65535"),
        ({"host_ip": "web"}, "host_ip", "is 'web', which is neither localhost nor a numeric address"),
        ({"host_socket": "web.sock"}, "host_socket", "is 'web.sock', which is not an absolute path"),
        ({"host_socket": "/a\n"}, "host_socket", "is '/a\\n', which is not an absolute path"),
        ({"host_socket": "/t/x/../a"}, "host_socket", "is '/t/x/../a'; write it as /t/a"),
        ({"host_socket": "/" + "x" * 107}, "host_socket", "has 108 bytes, of which the system allows 107"),
        (
            {"host_socket": "/a", "ports": 2},
            "host_socket",
            "is one for 2 ports of the guest; name one guest_port",
        ),
        ({"host_socket": "/a", "proto": Proto.UDP}, "host_socket", "is a stream, and UDP is not"),
        ({"host_socket": "/a", "ignore": True}, "host_socket", "is given for ports that are ignored"),
        ({"static": True, "ignore": True}, "static", "and ignore are both true: nothing would listen"),
        ({"static": True, "ports": 257}, "static", "is for 257 ports; 256 are possible in a rule"),
        (
            {"static": True, "guest_port": 20, "ports": 3},
            "guest_port",
            "has 22 in it, which is the VM's own SSH server and stays inside",
        ),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_its_key_and_the_reason(
    values: dict[str, object], key: str, reason: str
) -> None:
    with pytest.raises(InvalidRule) as caught:
        rule(**values)
    assert (caught.value.key, str(caught.value)) == (key, f"{key} {reason}")
    with pytest.raises(ValueError, match=r"^rule 2: "):
        check_settings(PortSettings([rule(), PortRule(**{"guest_port": 80, "ports": 1, **values})]))  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [-1, 1, 1022, 64513, 70000])
def test_an_offset_moves_all_privileged_ports_to_others_or_is_refused(offset: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^the privileged offset is {offset}; it can be 0 \(none\) or 1023 to 64512$"
    ):
        check_settings(PortSettings(privileged_offset=offset))
    for allowed in (0, 1023, 64512):
        check_settings(PortSettings(privileged_offset=allowed))


def test_the_list_of_rules_is_bounded() -> None:
    with pytest.raises(ValueError, match="there are 257 rules; 256 are possible"):
        check_settings(PortSettings([rule()] * 257))


@pytest.mark.parametrize(
    ("host", "text"),
    [
        (HostAddress(Proto.TCP, LOCALHOST, 80), "localhost:80"),
        (HostAddress(Proto.UDP, "fd00::7", 53), "[fd00::7]:53/udp"),
        (HostSocket("/run/web.sock"), "/run/web.sock"),
    ],
)
def test_an_end_is_shown_as_people_write_it(host: rules.HostEnd, text: str) -> None:
    assert str(host) == text


def test_a_static_rule_opens_nothing_that_an_earlier_rule_has_decided() -> None:
    elsewhere = rule(static=True, host_port=9090)
    for first in (rule(ignore=True), rule(guest_ip="0.0.0.0", ignore=True), rule(host_port=7070)):
        assert list(statics(PortSettings([first, elsewhere]))) == []
    udp_only = rule(proto=Proto.UDP, ignore=True)
    (left,) = statics(PortSettings([udp_only, elsewhere]))
    assert (left.proto, left.host, left.rank) == (Proto.TCP, HostAddress(Proto.TCP, LOCALHOST, 9090), 2)


def test_a_port_of_the_machine_that_is_its_own_is_left_alone_unless_a_rule_says_otherwise() -> None:
    own = rules.IgnorePort(2222, "its own SSH server")
    listed = rules.complete(PortSettings(), (own,))
    assert decide(Listener(Proto.TCP, "0.0.0.0", 2222), listed) == rules.Ignored("its own SSH server")
    assert isinstance(decide(Listener(Proto.UDP, "0.0.0.0", 2222), listed), rules.Forwarding)
    assert isinstance(decide(Listener(Proto.TCP, "0.0.0.0", 2223), listed), rules.Forwarding)
    asked = PortRule(guest_port=2222, ports=1, host_port=3333)
    listed = rules.complete(PortSettings([asked]), (own,))
    assert isinstance(decide(Listener(Proto.TCP, "127.0.0.1", 2222), listed), rules.Forwarding)
