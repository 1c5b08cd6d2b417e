"""A text that people change: what cannot be is not put in place, and nobody's change is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from host_agent.configuration import config
from host_agent.configuration.file import ConfigFile, NotUnderstood
from host_agent.configuration.keys import GIB, Host
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths

HOST = Host(cpus=8, memory=16 * GIB)


@pytest.fixture
def file(home: Home, instance: InstancePaths) -> ConfigFile:
    """With a text of its own."""
    instance.config.write_text("cpus: 2  # mine\n")
    return ConfigFile(home, instance)


def writing(text: str) -> Callable[[Path], None]:
    """An editor that leaves this behind."""
    return lambda path: path.write_text(text) and None


def test_what_was_edited_is_put_in_place(file: ConfigFile) -> None:
    seen = []

    def edit(path: Path) -> None:
        seen.append(path.read_text())
        path.write_text("cpus: 3  # mine\n")

    changed = file.edited(edit, HOST)
    assert changed is not None
    assert changed.cpus == 3
    assert seen == ["cpus: 2  # mine\n"]
    assert file.path.read_text() == "cpus: 3  # mine\n"
    assert config.load(file.instance or file.home.instance(), HOST) == changed
    assert not file.draft.exists()


def test_what_was_not_changed_leaves_nothing(home: Home) -> None:
    file = ConfigFile(home, home.instance("new"))
    assert file.edited(lambda path: None, HOST) is None
    assert list((home.root / "instances").iterdir()) == []
    assert list(home.root.glob("*draft*")) == []


def test_a_new_instance_can_be_edited_before_it_is(home: Home) -> None:
    file = ConfigFile(home, home.instance("new"))
    changed = file.edited(
        lambda path: path.write_text(path.read_text().replace("lan: false", "lan: true")) and None, HOST
    )
    assert changed is not None
    assert changed.lan
    kept = config.load(home.instance("new"), HOST)
    assert kept == changed
    assert [spec.real_path for spec in kept.mounts] == [spec.real_path for spec in changed.mounts] != [""]


def test_the_identity_stays_what_it_was(file: ConfigFile, instance: InstancePaths) -> None:
    first = file.change(lambda text: "cpus: 3\n", HOST)
    second = file.change(lambda text: "cpus: 4\n", HOST)
    assert first.identity == second.identity == config.load(instance, HOST).identity


@pytest.mark.parametrize(
    ("text", "said", "code"),
    [
        ("cpus: [", " line 1: this is not YAML", ExitCode.USAGE),
        ("cpuss: 3\nlan: 1\n", " line 1: cpuss is no key", ExitCode.USAGE),
        ("cpus: 99\n", "this machine has 8 cpus; asked for 99", ExitCode.RESOURCES),
        ("disk: 5GiB\n", "the disk has 6 GiB and never shrinks", ExitCode.RESOURCES),
    ],
)
def test_what_cannot_be_is_kept_aside_and_gone_on_with(
    file: ConfigFile, instance: InstancePaths, text: str, said: str, code: ExitCode
) -> None:
    with instance.data_disk.open("wb") as disk:
        disk.truncate(6 * GIB)
    with pytest.raises(UserError) as caught:
        file.edited(writing(text), HOST)
    assert said in caught.value.message
    assert caught.value.exit_code is code
    assert file.path.read_text() == "cpus: 2  # mine\n"
    assert file.draft.read_text() == text
    if isinstance(caught.value, NotUnderstood):
        assert len(caught.value.mistakes) == text.count("\n") or 1

    def mend(path: Path) -> None:
        assert path.read_text() == text
        path.write_text("cpus: 4\ndisk: 6GiB\n")

    assert file.edited(mend, HOST) is not None
    assert not file.draft.exists()


def test_an_editor_that_fails_leaves_a_draft_only_if_there_is_something_in_it(file: ConfigFile) -> None:
    def fail(path: Path) -> None:
        raise UserError("the editor ended")

    with pytest.raises(UserError, match="the editor ended"):
        file.edited(fail, HOST)
    assert not file.draft.exists()

    def fail_late(path: Path) -> None:
        path.write_text("cpus: 5\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.edited(fail_late, HOST)
    assert file.draft.read_text() == "cpus: 5\n"
    assert file.path.read_text() == "cpus: 2  # mine\n"


def test_a_change_that_came_meanwhile_is_not_overwritten(file: ConfigFile, instance: InstancePaths) -> None:
    def edit(path: Path) -> None:
        config.save_changes(instance, config.load(instance, HOST), lan=True)
        path.write_text("cpus: 3\n")

    with pytest.raises(UserError, match="changed by somebody else meanwhile") as caught:
        file.edited(edit, HOST)
    assert str(file.draft) in caught.value.hint
    assert config.load(instance, HOST).lan
    assert file.draft.read_text() == "cpus: 3\n"


def test_the_template_of_new_instances(home: Home, instance: InstancePaths) -> None:
    file = ConfigFile(home, None)
    file.change(lambda text: text.replace("lan: false", "lan: true"), HOST)
    assert config.load(instance, HOST).lan
    assert not instance.machine.exists()
    with pytest.raises(NotUnderstood):
        file.change(lambda text: "cpuss: 1\n", HOST)


def test_what_was_taken_over_keeps_its_identity(home: Home, instance: InstancePaths) -> None:
    identity = "12345678-1234-5678-1234-567812345678"
    old = {"cpus": 2, "memory": 1 << 30, "disk": 60 * GIB, "accelerator": "tcg", "identity": identity}
    instance.old_config.write_text(json.dumps(old))
    changed = ConfigFile(home, instance).change(lambda text: text.replace("cpus: 2", "cpus: 3"), HOST)
    assert (changed.cpus, changed.identity, changed.accelerator) == (3, identity, "tcg")
    assert config.load(instance, HOST) == changed
    assert not instance.old_config.exists()
