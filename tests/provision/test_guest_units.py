"""The guest's own units, as far as they must agree with each other and with the machine they run on."""

from __future__ import annotations

import ipaddress
import json
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

from guest_agent.accounts import EXTRA_GROUPS
from guest_agent.tracefs import BOOT_INSTANCE, EVENTS
from host_agent.docker_ready import DOCKER_SOCKET
from host_agent.proxies import VARIABLES
from provision import recipe
from provision.machine import (
    CONTROL_PORT,
    FILES_PORT,
    GUEST_ADDRESS,
    GUEST_NETWORK,
    HOST_ADDRESS,
    NAME_SERVER_ADDRESS,
)

GUEST = recipe.HERE / "guest"
UNITS = GUEST / "etc/systemd/system"


class _Unit(ConfigParser):
    """systemd.syntax(7), but that a key given twice has its values in one string, one a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(interpolation=None, strict=False, delimiters="=", comment_prefixes=("#", ";"))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.values_of: dict[str, list[str]] = {}
        for line in path.read_text().splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                self.values_of.setdefault(key, []).append(value)
        self.read(path)

    def words(self, key: str) -> set[str]:
        return {word for value in self.values_of.get(key, []) for word in value.split()}


def unit(name: str) -> _Unit:
    return _Unit(UNITS / name)


@pytest.mark.parametrize(
    ("name", "port", "module"),
    [
        ("agentctl-agent.service", CONTROL_PORT, "guest_agent"),
        ("agentctl-files.service", FILES_PORT, "guest_agent.files"),
    ],
)
def test_each_port_has_its_agent(name: str, port: str, module: str) -> None:
    agent = unit(name)
    assert agent["Service"]["ExecStartPre"].split() == [
        "/usr/lib/agentctl/prepare-agent",
        f"/dev/virtio-ports/{port}",
    ]
    assert agent["Service"]["ExecStart"].split()[-2:] == ["-m", module]
    assert "PYTHONPATH=/run/agentctl/agent" in agent["Service"]["Environment"]
    assert agent["Service"]["Restart"] == "always"
    assert name in (GUEST / "usr/lib/agentctl/finish-build").read_text()


RUNTIMES = ["docker.service", "podman.service", "podman-restart.service"]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["agentctl-agent.service", "agentctl-files.service"])
def test_docker_finds_what_the_agents_prepare_but_does_not_depend_on_them(name: str, runtime: str) -> None:
    docker = unit(f"{runtime}.d/agentctl.conf")
    assert name in docker.words("After")
    assert name in docker.words("Wants")
    assert name not in docker.words("Requires")
    assert "agentctl-data.service" in docker.words("Requires")
    assert "agentctl-data.service" in docker.words("After")
    # It waits, but not for ever, and not less when the agent is killed while it starts.
    agent = unit(name)
    assert int(agent["Unit"]["JobRunningTimeoutSec"]) <= 120
    assert agent["Service"]["RestartMode"] == "direct"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_docker_has_the_proxies_that_the_agent_writes_if_there_are_any(runtime: str) -> None:
    assert "-/etc/environment" in unit(f"{runtime}.d/agentctl.conf").words("EnvironmentFile")


def test_podman_is_where_docker_would_be() -> None:
    socket = unit("podman.socket.d/agentctl.conf")
    # podman takes one, and ends with more.
    assert socket.values_of["ListenStream"] == ["", DOCKER_SOCKET.path]
    assert socket["Socket"]["SocketGroup"] in EXTRA_GROUPS
    containers = tomllib.loads((GUEST / "etc/containers/containers.conf").read_text())
    assert containers["containers"]["host_containers_internal_ip"] == HOST_ADDRESS
    # With its containers, on the data disk.
    assert containers["network"]["network_config_dir"].startswith("/var/lib/containers/")


def test_whoever_becomes_root_keeps_the_proxies() -> None:
    lines = (GUEST / "etc/sudoers.d/agentctl").read_text().splitlines()
    kept = {
        name
        for line in lines
        if " env_keep += " in line
        for name in line.partition('"')[2].strip('"').split()
    }
    assert kept == {*VARIABLES, *(name.upper() for name in VARIABLES)}


def test_the_host_has_its_names_and_is_the_gateway_of_containers() -> None:
    rows = [line.split() for line in (GUEST / "etc/hosts").read_text().splitlines()]
    assert [HOST_ADDRESS, "host.agentctl.internal", "host.docker.internal"] in rows
    assert json.loads((GUEST / "etc/docker/daemon.json").read_text())["host-gateway-ip"] == HOST_ADDRESS
    assert (GUEST / "etc/resolv.conf").read_text() == f"nameserver {NAME_SERVER_ADDRESS}\n"
    # What the initrd gives the guest, and QEMU the others.
    init = (GUEST / "usr/lib/agentctl/init").read_text()
    assert f"ip addr add {GUEST_ADDRESS}/24" in init
    network = ipaddress.ip_network(GUEST_NETWORK)
    assert [str(network[number]) for number in (2, 3, 15)] == [
        HOST_ADDRESS,
        NAME_SERVER_ADDRESS,
        GUEST_ADDRESS,
    ]


def test_mounts_are_everybodys_and_outlive_the_agent() -> None:
    files = unit("agentctl-files.service")
    assert int(files["Service"]["FileDescriptorStoreMax"]) >= 64
    assert files["Service"]["Type"] == "notify"
    # What is bound to /home later would hide a mount below it.
    assert "agentctl-data.service" in files.words("After")
    private = {"PrivateTmp", "PrivateMounts", "PrivateDevices", "ProtectSystem", "ProtectHome", "MountFlags"}
    assert not private & set(files["Service"])


def test_shared_memory_is_mounted_by_the_initrd_and_outlives_the_agents() -> None:
    init = (GUEST / "usr/lib/agentctl/init").read_text()
    # Its modules are loaded at the same time as the root's, and are there when it is looked for.
    words = init.split()
    assert words.index("beside") < words.index("order") < words.index("wait") < words.index("/dev/pmem0")
    command = next(line.split() for line in init.splitlines() if "/dev/pmem0 /root/run" in line)
    assert command[command.index("/dev/pmem0") + 1] == "/root/run/agentctl/bulk"
    options = set(command[command.index("-o") + 1].split(","))
    assert {"dax=always", "nosuid", "nodev", "noexec"} <= options
    # It goes on without: nothing between the test for the device and its end can end the script.
    block = init.partition("if [ -b /dev/pmem0 ]")[2].partition("\nfi\n")[0]
    assert "exit" not in block
    for agent in ("agentctl-agent.service", "agentctl-files.service"):
        assert "run-agentctl-bulk.mount" in unit(agent).words("After")
        assert not any(
            "bulk" in word for key in ("Requires", "Wants", "BindsTo") for word in unit(agent).words(key)
        )


def test_every_script_of_the_guest_can_be_run() -> None:
    scripts = [path for path in (GUEST / "usr/lib/agentctl").iterdir() if path.is_file()]
    assert scripts
    for script in scripts:
        assert script.read_bytes().startswith(b"#!")
        assert script.stat().st_mode & 0o100, script


def test_the_initrd_switches_on_what_the_agent_takes_over() -> None:
    script = (GUEST / "usr/lib/agentctl/init").read_text()
    assert f'mkdir "$tracing/instances/{BOOT_INSTANCE}"' in script
    (events,) = (line for line in script.splitlines() if line.strip().startswith("for event in "))
    assert events.strip() == f"for event in {' '.join(EVENTS)}; do"


def test_what_patches_the_kernel_is_loaded_while_nothing_else_runs() -> None:
    assert recipe.load(machine="x86_64").alone_modules == ("virtio_balloon",)
    lines = (GUEST / "usr/lib/agentctl/init").read_text().splitlines()
    assert lines.index("load alone") < min(lines.index("load beside &"), lines.index("load order"))


def test_the_journal_is_in_memory_and_bounded() -> None:
    journal = _Unit(GUEST / "etc/systemd/journald.conf.d/agentctl.conf")["Journal"]
    assert journal["Storage"] == "volatile"
    assert journal["RuntimeMaxUse"] == "32M"


def test_docker_bounds_what_containers_say() -> None:
    settings = json.loads((GUEST / "etc/docker/daemon.json").read_text())
    # It keeps five files of 20 MB of each container; json-file, which is Docker's default, keeps everything.
    assert settings["log-driver"] == "local"
