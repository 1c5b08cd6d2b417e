"""The keys: what is understood, and that editors are told the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from host_agent.configuration import keys as config_keys
from host_agent.configuration import text as config_text
from host_agent.configuration.keys import Host, InstanceConfig
from host_agent.configuration.kinds import (
    Bytes,
    Choice,
    Flag,
    Integer,
    Invalid,
    Kind,
    ListOf,
    MapOf,
    Plain,
    Text,
)
from host_agent.configuration.template import template

HOST = Host(cpus=8, memory=1 << 34)


def test_the_template_says_what_is_so_by_default_with_a_comment_for_each_key() -> None:
    config = InstanceConfig.default(HOST)
    text = template(config, Path("/home/me/.agentctl/config.schema.json"))
    values = config_text.parse(text).values
    assert values == config_keys.plain(config)
    assert not config_keys.read(values).errors
    lines = text.splitlines()
    assert all(len(line) <= 120 for line in lines)
    for key in config_keys.keys().values():
        (number,) = (n for n, line in enumerate(lines) if re.match(rf" *{key.path[-1]}:", line))
        assert lines[number - 1].lstrip().startswith("# ")
    assert lines[0] == "# yaml-language-server: $schema=/home/me/.agentctl/config.schema.json"


def test_every_example_in_a_comment_is_one_that_is_understood() -> None:
    for key in config_keys.keys().values():
        example = "\n".join(line for line in key.comment.splitlines() if line.startswith("  "))
        if example:
            value = config_text.parse(example).values
            key.kind.read(value, key.path)
            jsonschema.validate(value, key.kind.schema())


def test_the_schema_is_one() -> None:
    schema = config_keys.schema()
    jsonschema.Draft7Validator.check_schema(schema)
    json.dumps(schema)
    for key in config_keys.keys().values():
        place = schema
        for part in key.path:
            place = place["properties"][part]
        assert place["description"] == key.comment


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True),
        ("cpus: 4\n", True),
        ("cpus: four\n", False),
        ("memory: 4GiB\n", True),
        ("memory: 4\n", True),
        ("memory: 1.5GiB\n", True),
        ("memory: lots\n", False),
        ("accelerator: kvm\n", True),
        ("accelerator: KVM\n", False),
        ("bulk: no\n", False),
        ("cpuss: 4\n", False),
        ("mounts:\n- ~\n- ~/src:ro\n- {host_path: /srv, read_only: true}\n", True),
        ("mounts:\n- {hostpath: /srv}\n", False),
        ("mounts: {a: 1}\n", False),
        ("mounts:\n", True),
        ("ports:\n", True),
        ("ports: 3\n", False),
        ("ports:\n  lam: true\n", False),
        ("ports:\n  rules:\n  - guest_port: 8000-8010\n    host_port: 9000-9010\n", True),
        ("ports:\n  rules:\n  - {guest_port: x}\n", False),
        ("ports:\n  rules:\n  - {guest_prot: 1}\n", False),
        ("sockets:\n- {guest: /a, host: /b, reverse: true}\n", True),
        ("sockets:\n- {guest: /a}\n", False),
        ("network:\n", True),
        ("network: {dns: [192.0.2.53], proxies: none, hosts: {db.test: 192.0.2.7}}\n", True),
        ("network: {proxies: {http_proxy: 'http://a:1'}}\n", True),
        ("network: {proxies: {http: 'http://a:1'}}\n", False),
        ("network: {dns: 192.0.2.53}\n", False),
        ("[1]\n", False),
    ],
)
def test_editors_mark_what_is_refused_and_nothing_else(text: str, allowed: bool) -> None:
    values = config_text.parse(text).values
    assert (not config_keys.read(values).errors) is allowed
    assert jsonschema.Draft7Validator(config_keys.schema()).is_valid(values) is allowed


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("cpuss",), "did you mean cpus?"),
        (("Memory",), "did you mean memory?"),
        (("lan",), "did you mean ports.lan?"),
        (("privilegedOffset",), "did you mean ports.privileged_offset?"),
        (("ports", "rule"), "did you mean rules?"),
        (("ports", "cpus"), "did you mean cpus?"),
        (("port",), "did you mean ports?"),
        (("quux",), "there are cpus, memory, "),
        (("ports", "quux"), "there are lan, privileged_offset, rules"),
    ],
)
def test_the_nearest_name_is_named(path: tuple[str, ...], said: str) -> None:
    values: Any = 1
    for name in reversed(path):
        values = {name: values}
    (error,) = config_keys.read(values).errors
    assert f"is no key; {said}" in str(error)
    assert error.path == path


def test_what_is_in_a_key_is_found() -> None:
    found = config_keys.find(("network", "hosts", "db.test"))
    assert found is not None
    assert (found[0], found[1].name) == ("network", "network")
    assert config_keys.find(("ports",)) is None
    assert config_keys.find(("none",)) is None


def no_evil(values: Any) -> None:
    if "evil" in values:
        raise ValueError("evil is refused")


@pytest.mark.parametrize(
    ("kind", "good", "bad", "reason"),
    [
        (Flag(), [True, False], ["yes", 1, None], "it is true or false"),
        (Integer(1, 9), [1, 9], [True, 1.0, "1", None], "it is a whole number"),
        (Integer(1, 9), [], [0], "it is at least 1"),
        (Integer(1, 9), [], [10], "it is at most 9"),
        (Bytes(), ["4GiB", "512MiB", "1B"], ["", True, [], "4 apples", "9" * 999], "it is a size"),
        (Choice("docker", "podman"), ["docker"], ["Docker", 1, None], "it is one of docker, podman"),
        (Text(), ["", "a"], [[], {}, None], "it is a text"),
        (Text(), [], [1, True, 1.5], "write it in quotes"),
        (Text("[a-z]+", "a word"), ["ab"], ["A", "a\n"], "it is a word"),
        (Text(most=3), [], ["abcd", "\0"], "has a NUL in it, or more than 3"),
        (ListOf(Flag(), 2), [[], [True]], [{}, "a"], "it is a list"),
        (ListOf(Flag(), 2), [], [[True] * 3], "has 3 entries; 2 are the most"),
        (ListOf(Flag(), 2), [], [[True, 1]], "at entry 2 is 1; it is true or false"),
        (MapOf(Text(), "[A-Z]+"), [{}, {"A": "b"}], [[], 1], "it is a mapping"),
        (MapOf(Text(), "[A-Z]+", "a variable"), [], [{"a": "b"}], '"a" is not a variable'),
        (MapOf(Text()), [], [{"a": 1}], "at.a is 1; it is a text: write it in quotes"),
        (Plain(no_evil), [{}, {"a": {"b": [1]}}], [{"evil": 1}], "at: evil is refused"),
    ],
)
def test_kinds(kind: Kind, good: list[Any], bad: list[Any], reason: str) -> None:
    for value in good:
        assert kind.plain(kind.read(value, ("at",))) == value
        jsonschema.validate(value, kind.schema())
    for value in bad:
        with pytest.raises(Invalid) as caught:
            kind.read(value, ("at",))
        assert reason in str(caught.value)
        assert str(caught.value).startswith("at")
        assert "\n" not in str(caught.value)
