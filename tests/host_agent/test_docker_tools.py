"""Finding and installing the docker CLI and its plugins, with an apt that is a shell script."""

from __future__ import annotations

import os
import shutil
import stat
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from host_agent import docker_tools
from host_agent.docker_tools import BUILDX, COMPOSE, DOCKER, Source, Tool, detect, ensure, uninstall
from host_agent.errors import ExitCode, UserError

TOOLS = (DOCKER, COMPOSE, BUILDX)

# `update` writes down what it was told; `download` puts an archive per package into the current directory.
# DEBS holds them, ready made.
APT = """
    echo "$*" >> "$LOG"
    while [ $# -gt 0 ]; do
        case "$1" in
        -c) cp "$2" "$DEBS/apt.conf"; cp "$(dirname "$2")/sources.list" "$DEBS/sources.list"; shift ;;
        -qq) ;;
        update) echo "dlstatus:1:50.0:Retrieving file 1 of 2"; echo "$APT_SAYS" >&2; exit $APT_EXIT ;;
        download) shift; for package; do cp "$DEBS/$package"_* .; done; echo "dlstatus:1:100:Done"; exit ;;
        esac
        shift
    done
"""
DPKG_DEB = 'mkdir -p "$3" && tar -x -f "$2" -C "$3"'


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + textwrap.dedent(body) + "\n")
    path.chmod(0o755)
    return path


@dataclass
class Machine:
    """A host as the tools see it: a PATH, a home, an archive of packages, and a log of calls of apt."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    progress: list[tuple[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in ("path", "home", "debs"):
            (self.root / folder).mkdir()
        for program in ("sh", "cp", "dirname", "mkdir", "tar", "sleep"):
            found = shutil.which(program)
            assert found is not None
            (self.root / "path" / program).symlink_to(found)
        (self.root / "keys.gpg").touch()
        self.environ = {
            "PATH": str(self.root / "path"),
            "HOME": str(self.root / "home"),
            "LOG": str(self.root / "log"),
            "DEBS": str(self.root / "debs"),
            "APT_EXIT": "0",
        }

    @property
    def tools(self) -> Path:
        return self.root / "tools"

    @property
    def plugins(self) -> Path:
        return self.root / "home" / ".docker" / "cli-plugins"

    @property
    def source(self) -> Source:
        return Source(keyring=self.root / "keys.gpg")

    def calls(self) -> list[str]:
        log = self.root / "log"
        return [line.split(" -qq ")[1] for line in log.read_text().splitlines()] if log.exists() else []

    def with_apt(self) -> Machine:
        script(self.root / "path" / "apt-get", APT)
        script(self.root / "path" / "dpkg", "echo riscv64")
        script(self.root / "path" / "dpkg-deb", DPKG_DEB)
        for tool in TOOLS:
            self.package(tool, 'echo "Docker version 26.1.5"')
        return self

    def with_docker(self, says: str = "Docker version 28.2.2, build e6534b4") -> Machine:
        script(self.root / "path" / "docker", f"echo '{says}'")
        return self

    def package(self, tool: Tool, body: str) -> None:
        """Put a package with ``tool`` as a shell script into the archive."""
        tree = self.root / "tree"
        script(tree / tool.member, body)
        archive = self.root / "debs" / f"{tool.package}_1.0_riscv64.deb"
        shutil.make_archive(str(archive), "tar", tree)
        archive.with_name(archive.name + ".tar").rename(archive)
        shutil.rmtree(tree)

    async def ensure(self) -> docker_tools.DockerTools:
        def progress(message: str, part: float) -> None:
            self.progress.append((message, part))

        with trio.fail_after(60):
            return await ensure(self.tools, progress=progress, environ=self.environ, source=self.source)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without any tools; the directories of the real one's system are out of sight."""
    monkeypatch.setattr(docker_tools, "SYSTEM_PLUGIN_DIRS", (tmp_path / "system",))
    return Machine(tmp_path)


# --- detection -------------------------------------------------------------------------------------


async def test_a_bare_machine_lacks_everything(machine: Machine) -> None:
    tools = await detect(machine.tools, machine.environ)
    assert tools.docker is None
    assert tools.missing == (DOCKER, COMPOSE, BUILDX)


@pytest.mark.parametrize("place", ["system", "home/.docker/cli-plugins", "opt"])
async def test_plugins_are_found_where_docker_looks(machine: Machine, place: str) -> None:
    machine.with_docker()
    script(machine.root / place / "docker-compose", "exit 0")
    config = machine.root / "home/.docker/config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(f'{{"cliPluginsExtraDirs": ["{machine.root}/opt"]}}')
    tools = await detect(machine.tools, machine.environ)
    assert (tools.docker, tools.compose, tools.buildx) == (machine.root / "path/docker", True, False)
    assert tools.missing == (BUILDX,)
    assert tools.installed == ()


async def test_a_plugin_that_cannot_be_executed_is_none(machine: Machine) -> None:
    script(machine.plugins / "docker-compose", "exit 0").chmod(0o644)
    assert not (await detect(machine.tools, machine.environ)).compose


async def test_podman_in_dockers_clothes_is_not_docker(machine: Machine) -> None:
    machine.with_docker("podman version 4.3.1")
    assert (await detect(machine.tools, machine.environ)).docker is None


async def test_a_docker_that_does_not_run_is_not_docker(machine: Machine) -> None:
    script(machine.root / "path/docker", "exit 127")
    assert (await detect(machine.tools, machine.environ)).docker is None


# --- installation ----------------------------------------------------------------------------------


async def test_a_bare_machine_gets_everything(machine: Machine) -> None:
    tools = await machine.with_apt().ensure()
    assert tools.docker == machine.tools / "bin/docker"
    assert tools.missing == ()
    assert tools.installed == ("docker", "compose", "buildx")
    assert machine.calls() == ["update", "download docker-cli docker-compose docker-buildx"]
    for tool in TOOLS:
        assert stat.S_IMODE((machine.tools / tool.place).stat().st_mode) == 0o755
    assert (machine.plugins / "docker-compose").readlink() == machine.tools / "cli-plugins/docker-compose"
    assert sorted(os.listdir(machine.tools)) == [".lock", "bin", "cli-plugins"], "no staging is left"


async def test_progress_is_shown_and_only_grows(machine: Machine) -> None:
    await machine.with_apt().ensure()
    parts = [part for _, part in machine.progress]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    assert ("reading Debian's package lists", 0.15) in machine.progress, "apt's own progress"
    assert "unpacking docker-buildx" in [message for message, _ in machine.progress]


async def test_apt_is_kept_from_the_hosts_lists_and_told_what_to_trust(machine: Machine) -> None:
    await machine.with_apt().ensure()
    sources = (machine.root / "debs/sources.list").read_text().splitlines()
    keyring = f"[arch=riscv64 target=Packages signed-by={machine.root}/keys.gpg]"
    assert sources[0] == f"deb {keyring} http://deb.debian.org/debian trixie main"
    assert sources[2] == f"deb {keyring} http://deb.debian.org/debian-security trixie-security main"
    configuration = (machine.root / "debs/apt.conf").read_text()
    for setting in ("Dir::State ", "Dir::Cache ", "Dir::Etc::sourcelist ", "Dir::Etc::sourceparts "):
        (line,) = [line for line in configuration.splitlines() if line.startswith(setting)]
        assert line.startswith(f'{setting}"{machine.tools}/.staging-')


async def test_nothing_is_done_where_nothing_is_missing(machine: Machine) -> None:
    machine.with_docker()
    for name in ("docker-compose", "docker-buildx"):
        script(machine.root / "system" / name, "exit 0")
    assert (await machine.ensure()).installed == ()
    assert machine.progress == []
    assert not machine.tools.exists()


async def test_a_second_time_is_quick(machine: Machine) -> None:
    first = await machine.with_apt().ensure()
    assert await machine.ensure() == first
    assert len(machine.calls()) == 2


async def test_only_what_is_missing_is_installed(machine: Machine) -> None:
    machine.with_apt().with_docker()
    script(machine.root / "system/docker-buildx", "exit 0")
    tools = await machine.ensure()
    assert tools.docker == machine.root / "path/docker", "the host's own comes first"
    assert tools.installed == ("compose",)
    assert machine.calls()[-1] == "download docker-compose"
    assert not (machine.plugins / "docker-buildx").exists()


async def test_a_link_that_was_lost_is_made_again_without_a_download(machine: Machine) -> None:
    await machine.with_apt().ensure()
    (machine.plugins / "docker-compose").unlink()
    (machine.plugins / "docker-buildx").unlink()
    (machine.plugins / "docker-buildx").symlink_to(machine.root / "gone")
    assert (await machine.ensure()).missing == ()
    assert len(machine.calls()) == 2


async def test_a_plugin_of_the_users_is_not_replaced(machine: Machine) -> None:
    theirs = script(machine.plugins / "docker-compose", "exit 1")
    theirs.chmod(0o644)  # not usable, but not ours to judge
    tools = await machine.with_apt().ensure()
    assert not tools.compose
    assert not theirs.is_symlink()


async def test_two_at_once_install_once(machine: Machine) -> None:
    machine.with_apt()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.ensure)
        nursery.start_soon(machine.ensure)
    assert len(machine.calls()) == 2
    assert (await detect(machine.tools, machine.environ)).missing == ()


async def test_an_interrupted_installation_leaves_no_tool_and_the_next_one_works(machine: Machine) -> None:
    machine.with_apt()
    script(machine.root / "path/dpkg-deb", "sleep 60")
    (machine.tools / ".staging-of-a-killed-process").mkdir(parents=True)
    with trio.move_on_after(1) as scope:
        await machine.ensure()
    assert scope.cancelled_caught
    assert os.listdir(machine.tools) == [".lock"]
    script(machine.root / "path/dpkg-deb", DPKG_DEB)
    assert (await machine.ensure()).missing == ()


# --- failures --------------------------------------------------------------------------------------


async def failure(machine: Machine) -> UserError:
    with pytest.raises(UserError) as caught:
        await machine.ensure()
    assert caught.value.hint
    assert not any((machine.tools / tool.place).exists() for tool in TOOLS), "no half-installed tool"
    assert not list(machine.tools.glob(".staging-*"))
    return caught.value


async def test_without_apt_the_user_is_told_what_to_install(machine: Machine) -> None:
    error = await failure(machine)
    assert "without apt" in error.message
    assert "no Docker engine is needed" in error.hint
    assert error.exit_code is ExitCode.DEPENDENCY


async def test_without_debians_keys_nothing_is_downloaded(machine: Machine) -> None:
    machine.with_apt()
    (machine.root / "keys.gpg").unlink()
    error = await failure(machine)
    assert error.hint == "sudo apt-get install debian-archive-keyring"
    assert machine.calls() == []


async def test_what_apt_complains_of_is_passed_on(machine: Machine) -> None:
    machine.with_apt()
    machine.environ |= {"APT_EXIT": "100", "APT_SAYS": "E: Could not resolve 'deb.debian.org'"}
    error = await failure(machine)
    assert error.message.endswith("could not be downloaded: Could not resolve 'deb.debian.org'")
    assert "network" in error.hint


def corrupt(machine: Machine) -> None:
    (machine.root / "debs/docker-cli_1.0_riscv64.deb").write_text("not an archive")


def incompatible(machine: Machine) -> None:
    machine.package(DOCKER, "echo 'GLIBC_2.34 not found' >&2; exit 1")


@pytest.mark.parametrize(
    ("spoil", "complaint", "exit_code"),
    [
        (corrupt, "the package docker-cli could not be unpacked", ExitCode.RESOURCES),
        (incompatible, "does not run on this system", ExitCode.DEPENDENCY),
    ],
)
async def test_a_tool_that_is_not_whole_or_does_not_run_is_not_installed(
    machine: Machine, spoil: Callable[[Machine], None], complaint: str, exit_code: ExitCode
) -> None:
    spoil(machine.with_apt())
    error = await failure(machine)
    assert complaint in error.message
    assert error.exit_code is exit_code


async def test_a_tool_that_hangs_is_given_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_tools, "TRIAL_TIMEOUT", 0.3)
    machine.with_apt().package(DOCKER, "exec sleep 60")
    assert "does not run" in (await failure(machine)).message


# --- removal ---------------------------------------------------------------------------------------


async def test_uninstall_removes_what_was_installed_and_nothing_else(machine: Machine) -> None:
    await machine.with_apt().ensure()
    theirs = script(machine.plugins / "docker-scout", "exit 0")
    removed = uninstall(machine.tools, machine.environ)
    assert set(removed) == {
        machine.tools / "bin/docker",
        machine.tools / "cli-plugins/docker-compose",
        machine.tools / "cli-plugins/docker-buildx",
        machine.plugins / "docker-compose",
        machine.plugins / "docker-buildx",
    }
    assert list(machine.plugins.iterdir()) == [theirs]
    assert uninstall(machine.tools, machine.environ) == ()


async def test_uninstall_leaves_a_link_that_leads_elsewhere(machine: Machine) -> None:
    machine.plugins.mkdir(parents=True)
    link = machine.plugins / "docker-compose"
    link.symlink_to(script(machine.root / "opt/docker-compose", "exit 0"))
    assert uninstall(machine.tools, machine.environ) == ()
    assert link.is_symlink()
