"""``agentctl config`` as a user meets it."""

from __future__ import annotations

import json
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import jsonschema
import pytest
import trio

from host_agent import editor, state
from host_agent.commands import config as commands
from host_agent.configuration import config
from host_agent.configuration import keys as config_keys
from host_agent.configuration import text as config_text
from host_agent.configuration.config import Host
from host_agent.configuration.file import ConfigFile
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import Mount, MountSpec, MountState, PortSettings, Stage
from tests.host_agent.command_line import Done, agentctl, said
from tests.host_agent.test_api_server import ASKED, served
from tests.host_agent.test_json_documents import examples


def edit(text: str, *words: str) -> Done:
    """With an editor that replaces the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISUAL", 'sh -c \'printf "%s" "$TEXT" > "$1"\' edit')
        patch.setenv("TEXT", text)
        return agentctl("config", "edit", *words)


def test_show_is_itself_a_configuration(home: Home) -> None:
    done = agentctl("config", "show")
    assert done.returncode == 0
    assert done.stdout.startswith(f"# {home.instance().config} (not there yet)\n")
    values = config_text.parse(done.stdout).values
    assert values == config_keys.plain(config.load(home.instance(), Host.measure()))
    told = json.loads(agentctl("config", "show", "--json").stdout)
    assert told == {"path": str(home.instance().config), "config": values, "waiting_for_restart": []}
    assert not home.instance().directory.exists()


def test_the_example_in_the_documentation_has_the_keys_that_are_printed(home: Home) -> None:
    (shown,), (validated,) = examples("config show"), examples("config validate")
    told = json.loads(agentctl("config", "show", "--json").stdout)
    assert set(shown) == set(told)
    assert not config_keys.read(shown["config"]).errors
    (home.root / "x.yaml").write_text("cpuss: 1\n")
    told = json.loads(agentctl("config", "validate", "--json", str(home.root / "x.yaml")).stdout)
    assert set(validated) == set(told)
    assert set(validated["mistakes"][0]) == set(told["mistakes"][0])


def test_set_changes_all_or_nothing(home: Home, instance: InstancePaths) -> None:
    done = agentctl("config", "set", "cpus=1", "ports.lan=true", "network.hosts.db.test=192.0.2.7")
    assert (done.returncode, done.stderr) == (0, "remembered for the next start\n")
    kept = config.load(instance, Host.measure())
    assert (kept.cpus, kept.lan, kept.network.hosts) == (1, True, (("db.test", "192.0.2.7"),))
    before = instance.config.read_bytes()
    for words, sentence, code in (
        (["memory=1", "cpus=four"], 'cpus is "four"; it is a whole number', ExitCode.USAGE),
        (["memory=1", "cpus=9999"], "cpus; asked for 9999", ExitCode.RESOURCES),
        (["memory=1", "cpuss=1"], "cpuss is no key; did you mean cpus?", ExitCode.USAGE),
    ):
        done = agentctl("config", "set", *words)
        assert sentence in said(done)[0]
        assert done.returncode == code
        assert instance.config.read_bytes() == before
    assert agentctl("config", "set").returncode == ExitCode.USAGE


def test_a_file_that_is_not_understood_is_not_changed_by_a_command(instance: InstancePaths) -> None:
    instance.config.write_text("cpus: [\n")
    done = agentctl("config", "set", "cpus=1")
    assert f"{instance.config} line 2: this is not YAML" in said(done)[0]
    assert "config edit" in said(done)[1]
    assert done.returncode == ExitCode.USAGE
    assert agentctl("config", "show").returncode == ExitCode.USAGE
    assert instance.config.read_text() == "cpus: [\n"


def test_edit(instance: InstancePaths) -> None:
    done = edit("cpus: 1 # mine\n")
    assert (done.returncode, done.stderr) == (0, "remembered for the next start\n")
    assert instance.config.read_text() == "cpus: 1 # mine\n"
    assert edit("cpus: 1 # mine\n").stderr == "nothing was changed\n"
    done = edit("cpus: one\nmem: 3\n")
    draft = instance.home.root / "config-default.draft.yaml"
    lines = done.stderr.splitlines()
    assert lines[0] == "warning: line 2: mem is no key; did you mean memory?"
    assert lines[1] == f'error: {instance.config} line 1: cpus is "one"; it is a whole number'
    assert lines[2] == f"hint: nothing was changed; your text is in {draft}: agentctl config edit"
    assert done.returncode == ExitCode.USAGE
    assert instance.config.read_text() == "cpus: 1 # mine\n"
    done = edit("cpus: 2\n")
    assert f"to begin afresh: rm {draft}" in done.stderr
    assert instance.config.read_text() == "cpus: 2\n"
    assert not draft.exists()


def test_up_with_edit_starts_nothing_if_the_text_is_not_understood(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", "cp /dev/null")
    monkeypatch.setenv("EDITOR", "sh -c 'echo cpus: one > \"$1\"' edit")
    monkeypatch.delenv("VISUAL", raising=False)
    done = agentctl("up", "--edit")
    assert done.returncode == ExitCode.USAGE
    assert 'cpus is "one"' in done.stderr
    assert not instance.config.exists()


def test_validate(home: Home, instance: InstancePaths, tmp_path: Path) -> None:
    assert agentctl("config", "validate").returncode == 0
    for text, code, sentences in (
        ("cpus: 1\n", 0, []),
        (
            "cpus: one\nports:\n  lam: 1\n",
            2,
            [" line 1: cpus is", " line 3: ports.lam is no key; did you mean lan?"],
        ),
        ("cpus: 9999\n", 4, [": this machine has"]),
        ("\x00", 2, [" line 1: this is not YAML"]),
    ):
        for path, words in ((tmp_path / "x.yaml", [str(tmp_path / "x.yaml")]), (instance.config, [])):
            path.write_text(text)
            done = agentctl("config", "validate", *words)
            assert done.returncode == code
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == len(sentences)
            for line, sentence in zip(errors, sentences, strict=True):
                assert line.startswith(f"error: {path}{sentence}")
    assert "No such file" in agentctl("config", "validate", str(tmp_path / "none")).stderr


def test_the_template(home: Home) -> None:
    assert agentctl("config", "set", "--template", "ports.lan=true").stderr == "new instances begin so\n"
    assert "  lan: true\n" in agentctl("config", "show", "--template").stdout
    assert "  lan: true\n" in agentctl("--instance", "dev", "config", "show").stdout
    assert not home.instance("dev").directory.exists()


def test_the_schema() -> None:
    printed = json.loads(agentctl("config", "schema").stdout)
    jsonschema.Draft7Validator.check_schema(printed)
    assert printed == config_keys.schema()


async def test_what_can_be_applied_to_a_vm_that_runs_is_and_the_rest_is_said(
    instance: InstancePaths, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = MountSpec("/srv/data", "/data")
    asked = replace(ASKED, identity=str(uuid.uuid4()), cpus=1, mounts=(shared,))
    config.save(instance, asked)
    config.save_kept(instance.running_config, asked)
    async with served(instance) as running:
        running.instance.mounts = [Mount(shared, MountState.MOUNTED)]
        status = running.instance.status
        running.instance.status = replace(
            status, stage=Stage.RUNNING, cpus=1, memory=asked.memory, disk=asked.disk
        )
        changed = replace(asked, lan=True, cpus=2, network=replace(asked.network, proxies="none"))
        config.save(instance, changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "is_locked", lambda path: path == instance.lock)
            await trio.to_thread.run_sync(commands._apply, instance, changed)
            waiting = await trio.to_thread.run_sync(commands._waiting, instance, changed)
            less = await trio.to_thread.run_sync(commands._waiting, instance, replace(asked, mounts=()))
        assert running.instance.ports == PortSettings([], True, 0)
    assert waiting == ("cpus", "network")
    assert less == ("mounts",)
    told = capfd.readouterr().err
    assert "cpus, network stay as they are until you restart it" in told
    assert told.endswith("applied\n")


@pytest.mark.parametrize(("answers", "ends"), [([True], "cpus: 2\n"), ([True, False], None)])
def test_on_a_terminal_one_is_asked_whether_to_edit_again(
    home: Home,
    instance: InstancePaths,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    answers: list[bool],
    ends: str | None,
) -> None:
    texts = iter(["cpus: one\nlan: 1\n", ends or "cpus: two\n"])
    asked = iter(answers)
    monkeypatch.setattr(editor, "edit", lambda path: path.write_text(next(texts)))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(click, "confirm", lambda *words, **options: next(asked))
    file = ConfigFile(home, instance)
    if ends:
        changed = commands.edited(file)
        assert changed is not None
        assert (changed.cpus, instance.config.read_text()) == (2, ends)
    else:
        with pytest.raises(UserError, match='cpus is "two"') as caught:
            commands.edited(file)
        assert str(file.draft) in caught.value.hint
        assert file.draft.read_text() == "cpus: two\n"
        assert not instance.config.exists()
    told = capfd.readouterr().err
    assert "line 2: lan is no key; did you mean ports.lan?" in told
    assert 'line 1: cpus is "one"; it is a whole number' in told
    assert next(asked, None) is None
