"""The docker context: what is written, what is preserved, and what the real docker CLI makes of it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from host_agent import docker_context
from host_agent.docker_context import Activation, activate, create, current, delete, restore

SOCKET = Path("/home/user/.agentctl/instances/default/docker.sock")
# What a user may have in there: keys of docker's, of credential helpers, and of programs of the future.
CONFIG = {
    "auths": {"registry.example": {"auth": "dTpw"}},
    "credsStore": "pass",
    "a key of the future": {"nested": [1, 2.5, None, "ü"]},
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / ".docker"


def write_config(directory: Path, config: object) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def read_config(directory: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((directory / "config.json").read_text())
    return config


# --- the real CLI ----------------------------------------------------------------------------------


def docker(directory: Path, *arguments: str) -> str:
    """Run the docker CLI of this machine with ``directory`` as its configuration."""
    program = shutil.which("docker")
    if program is None:
        pytest.skip("no docker CLI on this machine")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    environ["DOCKER_CONFIG"] = str(directory)
    done = subprocess.run([program, *arguments], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    return done.stdout.strip()


def test_docker_finds_the_context_and_uses_it(directory: Path) -> None:
    create(directory, "agentctl", SOCKET)
    activation = activate(directory, "agentctl")
    assert docker(directory, "context", "show") == "agentctl"
    (context,) = json.loads(docker(directory, "context", "inspect", "agentctl"))
    assert context["Endpoints"]["docker"] == {"Host": f"unix://{SOCKET}", "SkipTLSVerify": False}
    assert context["Storage"]["MetadataPath"].startswith(str(directory))
    restore(directory, activation)
    assert docker(directory, "context", "show") == "default"
    delete(directory, "agentctl")
    assert docker(directory, "context", "ls", "--format", "{{.Name}}") == "default"


def test_a_context_that_docker_made_current_comes_back(directory: Path) -> None:
    docker(directory, "context", "create", "colima", "--docker", "host=unix:///colima.sock")
    docker(directory, "context", "use", "colima")
    create(directory, "agentctl", SOCKET)
    activation = activate(directory, "agentctl")
    assert activation == Activation("agentctl", "colima", active=True)
    assert docker(directory, "context", "show") == "agentctl"
    restore(directory, activation)
    assert docker(directory, "context", "show") == "colima"


def test_docker_removes_what_was_created_here(directory: Path) -> None:
    create(directory, "agentctl", SOCKET)
    docker(directory, "context", "rm", "agentctl")
    assert list((directory / "contexts" / "meta").iterdir()) == []


# --- names and places ------------------------------------------------------------------------------


def test_the_default_instance_has_the_plain_name() -> None:
    assert docker_context.context_name("default") == "agentctl"
    assert docker_context.context_name("work") == "agentctl-work"


def test_docker_config_is_honoured() -> None:
    assert docker_context.config_dir({"HOME": "/home/user"}) == Path("/home/user/.docker")
    assert docker_context.config_dir({"HOME": "/home/user", "DOCKER_CONFIG": "/etc/d"}) == Path("/etc/d")


def test_a_context_is_stored_under_the_hash_of_its_name(directory: Path) -> None:
    create(directory, "agentctl", SOCKET, "A description")
    digest = "1053b2d19e0226a20730df9e519d34e527f72f88a376e0af7484e251300f1e5a"
    metadata = json.loads((directory / "contexts" / "meta" / digest / "meta.json").read_text())
    assert metadata == {
        "Name": "agentctl",
        "Metadata": {"Description": "A description"},
        "Endpoints": {"docker": {"Host": f"unix://{SOCKET}", "SkipTLSVerify": False}},
    }
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_context_is_brought_up_to_date(directory: Path) -> None:
    create(directory, "agentctl", Path("/old.sock"))
    create(directory, "agentctl", Path("/new.sock"))
    (metadata,) = directory.glob("contexts/meta/*/*")
    assert "unix:///new.sock" in metadata.read_text()


# --- activation ------------------------------------------------------------------------------------


def test_activation_and_restoration_change_one_key(directory: Path) -> None:
    write_config(directory, CONFIG)
    activation = activate(directory, "agentctl")
    assert read_config(directory) == {**CONFIG, "currentContext": "agentctl"}
    assert list(read_config(directory)) == [*CONFIG, "currentContext"], "the order is kept"
    assert restore(directory, activation) == ""
    assert read_config(directory) == CONFIG


@pytest.mark.parametrize("config", [{}, {"currentContext": ""}, {"currentContext": "default"}, ""])
def test_the_built_in_context_has_an_empty_name(directory: Path, config: object) -> None:
    write_config(directory, config)
    assert current(directory) == ""
    activation = activate(directory, "agentctl")
    assert activation == Activation("agentctl", "", active=True)
    restore(directory, activation)
    assert read_config(directory) == {}


def test_without_a_config_one_is_made_that_only_its_owner_may_read(directory: Path) -> None:
    assert activate(directory, "agentctl").active
    assert stat.S_IMODE((directory / "config.json").stat().st_mode) == 0o600


def test_mode_and_symlink_of_the_config_are_kept(directory: Path, tmp_path: Path) -> None:
    dotfiles = tmp_path / "dotfiles.json"
    dotfiles.write_text(json.dumps(CONFIG))
    dotfiles.chmod(0o640)
    directory.mkdir()
    (directory / "config.json").symlink_to(dotfiles)
    activate(directory, "agentctl")
    assert (directory / "config.json").readlink() == dotfiles
    assert json.loads(dotfiles.read_text())["currentContext"] == "agentctl"
    assert stat.S_IMODE(dotfiles.stat().st_mode) == 0o640


def test_a_second_activation_remembers_what_was_before_the_first(directory: Path) -> None:
    create(directory, "colima", Path("/colima.sock"))
    write_config(directory, {"currentContext": "colima"})
    first = activate(directory, "agentctl")
    # The agent is killed, and comes back with what the instance's state says.
    second = activate(directory, "agentctl", first)
    assert second == Activation("agentctl", "colima", active=True)
    restore(directory, second)
    assert current(directory) == "colima"


def test_what_the_user_chose_in_between_is_what_comes_back(directory: Path) -> None:
    create(directory, "podman", Path("/podman.sock"))
    first = activate(directory, "agentctl")
    write_config(directory, {"currentContext": "podman"})
    assert activate(directory, "agentctl", first).previous == "podman"


def test_a_choice_of_the_user_is_not_undone(directory: Path) -> None:
    activation = activate(directory, "agentctl")
    write_config(directory, {"currentContext": "podman"})
    assert restore(directory, activation) == ""
    assert current(directory) == "podman"


def test_a_previous_context_that_was_removed_is_not_brought_back(directory: Path) -> None:
    write_config(directory, {"currentContext": "gone"})
    restore(directory, activate(directory, "agentctl"))
    assert read_config(directory) == {}


@pytest.mark.parametrize("running", [True, False])
def test_another_instance_comes_back_only_if_it_is_up(directory: Path, tmp_path: Path, running: bool) -> None:
    other = tmp_path / "docker.sock"
    if running:
        other.touch()
    create(directory, "agentctl-work", other)
    write_config(directory, {"currentContext": "agentctl-work"})
    restore(directory, activate(directory, "agentctl"))
    assert current(directory) == ("agentctl-work" if running else "")


def test_delete_removes_the_context_and_leaves_others(directory: Path) -> None:
    create(directory, "agentctl", SOCKET)
    create(directory, "colima", Path("/colima.sock"))
    write_config(directory, {**CONFIG, "currentContext": "agentctl"})
    assert delete(directory, "agentctl") == ""
    assert [json.loads(path.read_text())["Name"] for path in directory.glob("contexts/meta/*/meta.json")] == [
        "colima"
    ]
    assert read_config(directory) == CONFIG
    assert delete(directory, "agentctl") == "", "it may be repeated"


# --- what cannot be used is left alone -------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("{broken", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"currentContext": 7}', "not a string"),
        ('{"auths": {}, "currentContext": "agent', "not valid JSON"),
    ],
)
def test_a_corrupt_config_costs_a_warning_and_stays_as_it_is(
    directory: Path, config: str, complaint: str
) -> None:
    path = write_config(directory, config)
    activation = activate(directory, "agentctl")
    assert not activation.active
    assert complaint in activation.warning
    assert "DOCKER_CONTEXT=agentctl" in activation.warning
    assert complaint in restore(directory, activation)
    assert complaint in delete(directory, "agentctl")
    assert current(directory) is None
    assert path.read_text() == config


def test_a_config_that_is_not_text_costs_a_warning(directory: Path) -> None:
    write_config(directory, "").write_bytes(b"\xff\xfe{}")
    assert "not valid JSON" in activate(directory, "agentctl").warning


def test_a_config_that_cannot_be_read_costs_a_warning(directory: Path) -> None:
    (directory / "config.json").mkdir(parents=True)
    assert "cannot be read" in activate(directory, "agentctl").warning


def test_a_config_that_cannot_be_written_costs_a_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(directory, CONFIG)
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    activation = activate(directory, "agentctl")
    assert "No space left on device" in activation.warning
    assert path.read_text() == before
    assert os.listdir(directory) == ["config.json"], "no temporary file is left"


# --- what the environment overrides ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "mentions"),
    [
        ({"DOCKER_HOST": "tcp://build:2375"}, "DOCKER_HOST=tcp://build:2375"),
        ({"DOCKER_CONTEXT": "colima"}, "DOCKER_CONTEXT=colima"),
        ({"DOCKER_HOST": "tcp://build:2375", "DOCKER_CONTEXT": "agentctl"}, "DOCKER_HOST"),
    ],
)
def test_a_variable_that_overrides_the_context_is_named(environ: dict[str, str], mentions: str) -> None:
    warning = docker_context.override_warning(environ, "agentctl", SOCKET)
    assert mentions in warning
    assert "unset it" in warning


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"DOCKER_HOST": "", "DOCKER_CONTEXT": ""},
        {"DOCKER_CONTEXT": "agentctl"},
        {"DOCKER_HOST": f"unix://{SOCKET}"},
    ],
)
def test_a_variable_that_leads_to_the_vm_is_no_reason_to_warn(environ: dict[str, str]) -> None:
    assert docker_context.override_warning(environ, "agentctl", SOCKET) == ""


def test_extra_plugin_directories_are_read_from_the_config(directory: Path) -> None:
    assert docker_context.extra_plugin_dirs(directory) == ()
    write_config(directory, {"cliPluginsExtraDirs": ["/opt/plugins"]})
    assert docker_context.extra_plugin_dirs(directory) == (Path("/opt/plugins"),)
    write_config(directory, "{broken")
    assert docker_context.extra_plugin_dirs(directory) == ()
