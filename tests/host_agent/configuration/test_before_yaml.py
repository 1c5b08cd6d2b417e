"""The configuration of before there was YAML is taken over once, whole."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from host_agent.configuration import config
from host_agent.configuration.before_yaml import from_old
from host_agent.configuration.config import Host
from host_agent.errors import UserError
from host_agent.network_settings import NetworkSettings
from host_agent.paths import InstancePaths
from protocol.api import MountSpec, PortRule, SocketForward

IDENTITY = str(uuid.uuid4())
OLD: dict[str, Any] = {
    "cpus": 2,
    "memory": 3221225473,
    "disk": 64424509440,
    "accelerator": "tcg",
    "identity": IDENTITY,
    "mounts": [
        {"host_path": "/srv/a", "guest_path": "/a", "read_only": True, "host_locks": False, "real_path": "/disk/a"},
        {"host_path": "/srv/b", "guest_path": "/srv/b", "read_only": False, "host_locks": False},
    ],
    "bulk": False,
    "sockets": [{"guest": "/run/db", "host": "localhost:5432", "reverse": True}],
    "lan": True,
    "privileged_offset": 10000,
    "rules": [{"proto": "any", "guest_port": 80, "host_ip": "localhost", "host_port": 8080}],
    "network": {"proxies": "none"},
}  # fmt: skip


def test_everything_of_it_is_taken_over_and_the_old_file_is_kept_aside(instance: InstancePaths) -> None:
    instance.old_config.write_text(json.dumps(OLD))
    instance.home.template.write_text("cpus: 1\nbulk: true\n")
    found = config.load(instance, Host.measure())
    assert not instance.config.exists(), "to look changes nothing"
    assert (found.cpus, found.memory, found.disk, found.accelerator) == (2, 3221225473, 64424509440, "tcg")
    assert (found.identity, found.bulk, found.lan, found.privileged_offset) == (IDENTITY, False, True, 10000)
    assert found.mounts == (MountSpec("/srv/a", "/a", True), MountSpec("/srv/b", "/srv/b"))
    assert [spec.real_path for spec in found.mounts] == ["/disk/a", ""]
    assert found.sockets == (SocketForward("/run/db", "localhost:5432", True),)
    assert found.rules == (PortRule(guest_port=80, ports=1, host_port=8080),)
    assert found.network == NetworkSettings(proxies="none")
    config.save(instance, found)
    again = config.load(instance, Host.measure())
    assert again == found
    assert [spec.real_path for spec in again.mounts] == ["/disk/a", ""]
    assert not instance.old_config.exists()
    assert json.loads(Path(f"{instance.old_config}.old").read_text()) == OLD
    assert instance.config.read_text().startswith("# yaml-language-server")


def test_an_agent_after_an_update_understands_what_the_one_before_it_kept(instance: InstancePaths) -> None:
    instance.running_config.write_text(json.dumps(OLD))
    kept = config.load_kept(instance.running_config)
    assert kept == from_old(OLD)


def test_a_power_cut_between_both_files_loses_nothing(instance: InstancePaths) -> None:
    instance.old_config.write_text(json.dumps(OLD))
    found = config.load(instance, Host.measure())
    config.save(instance, found)
    Path(f"{instance.old_config}.old").rename(instance.old_config)
    assert config.load(instance, Host.measure()) == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cpus": "4"}, 'cpus is "4"; it is a whole number'),
        ({"memory": "4GiB"}, 'a size is "4GiB"; it is a number of bytes'),
        ({"identity": "me"}, "badly formed"),
        ({"mounts": 1}, "mounts is 1; it is a list"),
        ({"mounts": [1]}, "mounts entry 1: it is the path of a folder"),
        ({"rules": [{"guest_prot": 1}]}, "did you mean guest_port"),
        ({"lan": 1}, "ports.lan is 1; it is true or false"),
        ({"more": 1}, "more is no key"),
    ],
)
def test_a_damaged_one_is_named_and_not_guessed_at(
    instance: InstancePaths, change: dict[str, Any], said: str
) -> None:
    content = json.dumps({**OLD, **change})
    instance.old_config.write_text(content)
    with pytest.raises(UserError, match=f"{instance.old_config} is damaged") as caught:
        config.load(instance, Host.measure())
    assert said in caught.value.message
    assert f"rm {instance.old_config}" in caught.value.hint
    assert instance.old_config.read_text() == content


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cpus": 4}', "[" * 100_000])
def test_what_is_none_is_refused(instance: InstancePaths, content: str) -> None:
    instance.old_config.write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        config.load(instance, Host.measure())
