"""The guest's own units, as far as they must agree with each other and with the machine they run on."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest

from provision import recipe
from provision.machine import CONTROL_PORT, FILES_PORT

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


def test_docker_finds_its_folders_but_does_not_depend_on_them() -> None:
    docker = unit("docker.service.d/agentctl.conf")
    assert "agentctl-files.service" in docker.words("After")
    assert "agentctl-files.service" in docker.words("Wants")
    assert "agentctl-files.service" not in docker.words("Requires")
    # It waits, but not for ever, and not less when the agent is killed while it starts.
    files = unit("agentctl-files.service")
    assert int(files["Unit"]["JobRunningTimeoutSec"]) <= 120
    assert files["Service"]["RestartMode"] == "direct"


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
    assert {"virtio_pmem", "nd_pmem"} <= set(recipe.load().initrd_modules)
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
