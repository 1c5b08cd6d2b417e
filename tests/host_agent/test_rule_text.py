"""Rules as people write them, and what they are told about those that cannot be."""

from __future__ import annotations

import json

import pytest

from host_agent import rule_text
from host_agent.errors import ExitCode, UserError
from host_agent.rules import InvalidRule
from protocol.api import PortRule, Proto


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({}, PortRule()),
        ({"guest_port": 80}, PortRule(guest_port=80, ports=1, host_port=80)),
        ({"guest_port": 80, "host_port": 8080}, PortRule(guest_port=80, ports=1, host_port=8080)),
        (
            {"proto": "tcp", "guest_port": "8000-8010", "host_port": [9000, 9010]},
            PortRule(Proto.TCP, guest_port=8000, ports=11, host_port=9000),
        ),
        (
            {"guest_ip": "0.0.0.0", "guest_port": [80, 81]},
            PortRule(guest_ip="0.0.0.0", guest_ip_must_be_zero=True, guest_port=80, ports=2, host_port=80),
        ),
        ({"guest_ip_must_be_zero": True}, PortRule(guest_ip="0.0.0.0", guest_ip_must_be_zero=True)),
        ({"guest_ip": "::", "guest_ip_must_be_zero": False}, PortRule(guest_ip="::")),
        (
            {"proto": "any", "guest_port": "53", "ignore": True},
            PortRule(guest_port=53, ports=1, host_port=53, ignore=True),
        ),
        (
            {"guest_port": 5432, "host_socket": "/tmp/db.sock", "static": True},
            PortRule(guest_port=5432, ports=1, host_port=5432, host_socket="/tmp/db.sock", static=True),
        ),
        (
            {"guest_port": 80, "host_ip": "0.0.0.0", "host_port": 80, "ignore": False},
            PortRule(guest_port=80, ports=1, host_ip="0.0.0.0", host_port=80),
        ),
    ],
)
def test_a_rule_of_the_file_is_understood_and_written_again(
    values: dict[str, object], rule: PortRule
) -> None:
    assert rule_text.from_json(values) == rule
    assert rule_text.from_json(json.loads(json.dumps(rule_text.as_json(rule)))) == rule


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"guest_prot": 80}, "guest_prot is no key of a rule; did you mean guest_port?"),
        ({"guestPort": 80}, "guestPort is no key of a rule; did you mean guest_port?"),
        (
            {"guestIPMustBeZero": True},
            "guestIPMustBeZero is no key of a rule; did you mean guest_ip_must_be_zero?",
        ),
        ({"hostSocket": "/a"}, "hostSocket is no key of a rule; did you mean host_socket?"),
        ({"zzz": 1}, f"zzz is no key of a rule; its keys are {', '.join(rule_text.KEYS)}"),
        ([], "a rule is a mapping"),
        ("80", "a rule is a mapping"),
        ({"proto": "sctp"}, "proto is 'sctp'; it is one of tcp, udp, any"),
        ({"proto": None}, "proto is null; it is a text in quotes"),
        ({"ignore": 1}, "ignore is 1; it is true or false"),
        ({"static": "yes"}, 'static is "yes"; it is true or false'),
        ({"guest_ip": 127}, "guest_ip is 127; it is a text in quotes"),
        ({"guest_port": True}, 'guest_port is true; it is a port or a range, like 8080 or "8000-8010"'),
        ({"guest_port": "http"}, 'guest_port is "http"; it is a port or a range, like 8080 or "8000-8010"'),
        (
            {"guest_port": [1, 2, 3]},
            'guest_port is [1, 2, 3]; it is a port or a range, like 8080 or "8000-8010"',
        ),
        ({"guest_port": "90-80"}, "guest_port is a range that ends (80) before it begins (90)"),
        ({"guest_port": 70000}, "guest_port is 70000; ports are 1-65535"),
        (
            {"guest_port": "80-90", "host_port": "80-89"},
            "host_port has 10 ports and guest_port 11; the ranges are equally long",
        ),
        ({"host_port": 80}, "host_port has 1 ports and guest_port 65535; the ranges are equally long"),
        ({"host_ip": "0.0.0.0", "ignore": True}, "host_ip is of no use beside ignore"),
        (
            {"guest_port": 80, "host_port": 80, "host_socket": "/a"},
            "host_port is of no use beside host_socket",
        ),
    ],
)
def test_what_cannot_be_is_refused(values: object, sentence: str) -> None:
    with pytest.raises(InvalidRule) as caught:
        rule_text.from_json(values)
    assert str(caught.value) == sentence


ANY = {"guest_ip": "0.0.0.0", "guest_ip_must_be_zero": False}


@pytest.mark.parametrize(
    ("text", "values", "again"),
    [
        ("80", {"guest_port": 80}, "80"),
        ("8080:80", {"guest_port": 80, "host_port": 8080}, "8080:80"),
        ("80:80/tcp", {"guest_port": 80, "proto": Proto.TCP}, "80/tcp"),
        ("53/udp", {"guest_port": 53, "proto": Proto.UDP}, "53/udp"),
        ("9000-9010:8000-8010", {"guest_port": 8000, "ports": 11, "host_port": 9000}, "9000-9010:8000-8010"),
        ("0.0.0.0:80:80", {"guest_port": 80, "host_ip": "0.0.0.0"}, "0.0.0.0:80:80"),
        ("[fd00::7]:80:81", {"guest_port": 81, "host_port": 80, "host_ip": "fd00::7"}, "[fd00::7]:80:81"),
        ("fd00::7:80:81", {"guest_port": 81, "host_port": 80, "host_ip": "fd00::7"}, "[fd00::7]:80:81"),
    ],
)
def test_the_words_of_a_rule(text: str, values: dict[str, object], again: str) -> None:
    full = {"ports": 1, "host_port": values["guest_port"], **ANY, **values}
    rule = rule_text.from_words(text)
    assert rule == PortRule(**full)  # type: ignore[arg-type]
    assert rule_text.words(rule) == again
    assert rule_text.from_words(again) == rule


def test_options_belong_to_the_words() -> None:
    assert rule_text.from_words("80", guest_ip="127.0.0.1", static=True) == PortRule(
        guest_port=80, ports=1, host_port=80, static=True
    )
    socket = rule_text.from_words("/run/db.sock:5432/tcp")
    assert (socket.host_socket, socket.guest_port) == ("/run/db.sock", 5432)
    assert rule_text.words(socket) == "/run/db.sock:5432/tcp"
    ignored = rule_text.from_words("1-100", ignore=True)
    assert (ignored.ignore, ignored.ports, rule_text.words(ignored)) == (True, 100, "1-100")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not a port"),
        ("http", "'http' is not a port"),
        ("80:", "'' is not a port"),
        (":80", "'' is not a port"),
        ("/run/db.sock", "there is no port of the VM behind the path"),
        ("/run/db.sock:80-81", "host_socket is one for 2 ports"),
        (":80:80", "there is no address before the first colon"),
        ("80/sctp", "proto is 'sctp'"),
        ("80/", "proto is ''"),
        ("web:80:80", "host_ip is 'web', which is neither localhost nor a numeric address"),
        ("0", "guest_port is 0"),
        ("1-10:1-9", "host_port has 10 ports and guest_port 9"),
    ],
)
def test_words_that_cannot_be_are_refused_with_how_to_write_them(text: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        rule_text.from_words(text)
    assert caught.value.message.startswith(f"{text!r} is no forward: {reason}")
    assert caught.value.hint.startswith("write it as [[HOST_IP:]HOST_PORT:]GUEST_PORT")
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_rule_is_found_by_its_words_whatever_its_options() -> None:
    web, ignored = (
        PortRule(guest_port=80, ports=1, host_port=8080),
        PortRule(guest_port=80, ports=1, ignore=True),
    )
    rules = [web, ignored, PortRule(Proto.TCP, guest_port=80, ports=1, host_port=8080)]
    assert rule_text.find(rules, "8080:80") == [web]
    assert rule_text.find(rules, "80") == [ignored]
    with pytest.raises(UserError, match="there is no rule 81"):
        rule_text.find(rules, "81")
