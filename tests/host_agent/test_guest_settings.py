from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import guest_settings
from host_agent.configuration import keys as config_keys
from host_agent.guest_settings import GuestSettings, Script
from host_agent.network_settings import InvalidSetting
from tests.host_agent.guest_values import PLAIN, config, from_json

FULL: dict[str, Any] = {
    "docker": {"registry-mirrors": ["https://mirror.test"], "log-opts": {"max-size": "10m"}},
    "environment": {"EDITOR": "nano", "GREETING": 'say "hi"'},
    "provision": [
        {"script": "apt-get install -y htop\n"},
        {"mode": "user", "name": "dotfiles", "file": "~/setup.sh"},
    ],
    "ssh_agent": True,
    "architectures": ["arm64"],
}


def test_what_is_not_said_is_as_the_image_has_it() -> None:
    assert from_json({}) == PLAIN.guest == GuestSettings()
    assert (
        from_json(dict.fromkeys(("docker", "environment", "provision", "architectures"))) == GuestSettings()
    )


def test_all_that_can_be_said() -> None:
    settings = from_json({**FULL, "cpus": 4})
    assert config({"cpus": 4}).with_guest(settings) == config({**FULL, "cpus": 4})
    assert json.loads(settings.docker) == FULL["docker"]
    assert settings.environment == (("EDITOR", "nano"), ("GREETING", 'say "hi"'))
    assert settings.provision == (
        Script("system", "", "apt-get install -y htop\n"),
        Script("user", "dotfiles", "", "~/setup.sh"),
    )
    assert (settings.ssh_agent, settings.architectures) == (True, ("arm64",))
    plain = config_keys.plain(config(FULL))
    assert {key: plain[key] for key in FULL} == FULL
    assert list(json.loads(settings.docker)) == list(FULL["docker"])


def test_a_script_alone_is_roots() -> None:
    assert from_json({"provision": ["true"]}).provision == (Script("system", script="true"),)


@pytest.mark.parametrize("name", ["aarch64", "linux/arm64", "ARM64", "arm64"])
def test_an_architecture_has_many_names(name: str) -> None:
    assert from_json({"architectures": [name, "arm64"]}).architectures == ("arm64",)


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"docker": []}, "docker", "daemon.json"),
        ({"docker": {"hosts": ["tcp://0.0.0.0"]}}, "hosts", "docker.sock"),
        ({"docker": {"data-root": "/x"}}, "data-root", "data disk"),
        ({"docker": {"userland-proxy": False}}, "userland-proxy", "published ports"),
        ({"docker": {"tlsverify": True}}, "tlsverify", "no port"),
        ({"docker": {"registry_mirrors": []}}, "registry_mirrors", "registry-mirrors"),
        ({"docker": {1: 2}}, "1", "no setting"),
        ({"docker": {"labels": object()}}, "docker", "JSON"),
        ({"docker": {"shutdown-timeout": float("nan")}}, "docker", "JSON"),
        ({"docker": {"log-opts": {1: "a"}}}, "docker", "in quotes"),
        ({"docker": {"labels": ["x" * 70_000]}}, "docker", "longer"),
        ({"environment": ["A=1"]}, "environment", "variables"),
        ({"environment": {"A B": "1"}}, "A B", "name of a variable"),
        ({"environment": {"A": 1}}, "A", "in quotes"),
        ({"environment": {"A": True}}, "A", "is true; put it in quotes"),
        ({"environment": {"A": "1\nB=2"}}, "A", "one line"),
        ({"environment": {f"A{n}": "x" * 8000 for n in range(5)}}, "environment", "more than"),
        ({"environment": {"PATH": "/bin"}}, "PATH", "login"),
        ({"provision": "true"}, "provision", "a list"),
        ({"provision": [1]}, "provision", "script 1"),
        ({"provision": [{"scrpt": "true"}]}, "scrpt", "did you mean script?"),
        ({"provision": [{"script": 1}]}, "script", "no text"),
        ({"provision": ["true", {"mode": "root", "script": "true"}]}, "mode", "script 2"),
        ({"provision": [{"script": "true", "file": "/x"}]}, "provision", "just one"),
        ({"provision": [{"script": "\n"}]}, "provision", "just one"),
        ({"provision": [{"file": "x.sh"}]}, "file", "begins with"),
        ({"provision": [{"script": "x" * (1 << 20) + "x"}]}, "script", "longer"),
        ({"provision": [{"name": "../x", "script": "true"}]}, "name", "letters"),
        ({"provision": ["true"] * 65}, "provision", "up to 64"),
        ({"architectures": "arm64"}, "architectures", "is a list"),
        ({"architectures": ["arm46"]}, "architectures", "did you mean arm64?"),
        ({"architectures": [1]}, "architectures", "possible are"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_key(values: dict[str, Any], key: str, said: str) -> None:
    ((name, value),) = values.items()
    with pytest.raises(InvalidSetting) as caught:
        getattr(guest_settings, name)(value)
    assert caught.value.key == key
    assert said in str(caught.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(guest_settings.KEYS), plain))
def test_anything_is_understood_or_refused_and_what_is_understood_comes_back(values: dict[str, Any]) -> None:
    reading = config_keys.read(values)
    if reading.errors:
        return
    understood = config(values)
    assert config(config_keys.plain(understood)).guest == understood.guest
