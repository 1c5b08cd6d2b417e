"""Sentences are true of a VM and of an attached machine alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from host_agent import kind
from host_agent.paths import Home
from tests.host_agent.command_line import agentctl

IS_ONE = '{"address": "me@box", "session": "s"}'


@pytest.fixture
def attached() -> Iterator[None]:
    kind.choose(attached=True)
    yield
    kind.choose(attached=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nothing in the VM listens there yet", "nothing on the attached machine listens there yet"),
        ("the VM does not run", "the attached machine does not run"),
        ("The VM's clock is slow.", "The attached machine's clock is slow."),
        ("the VM's own SSH server", "the attached machine's own SSH server"),
        ("SOCKS5 proxy, into the VM; ends", "SOCKS5 proxy, to the attached machine; ends"),
        ("1 B/s from the VM, 2 B/s to it", "1 B/s from the attached machine, 2 B/s to it"),
        ("a VM needs memory", "a VM needs memory"),
        ("the VMs", "the VMs"),
        ("/srv/the VM/file: No such file", "/srv/the VM/file: No such file"),
        ("bathe VM", "bathe VM"),
    ],
)
def test_it_is_called_what_it_is(attached: None, text: str, shown: str) -> None:
    assert kind.called(text) == shown
    assert kind.called(text, attached=False) == text


def test_a_vm_is_a_vm() -> None:
    assert kind.called("in the VM") == "in the VM"
    assert kind.called("in the VM", attached=True) == "on the attached machine"
    assert kind.in_json({"reason": "in the VM"}) == {"reason": "in the VM"}


def test_of_json_only_sentences_are_touched(attached: None) -> None:
    said = {
        "reason": "the VM waits",
        "path": "the VM",
        "rows": [{"hint": "in the VM"}],
        "warnings": ["the VM"],
        "n": 1,
    }
    assert kind.in_json(said) == {
        "reason": "the attached machine waits",
        "path": "the VM",
        "rows": [{"hint": "on the attached machine"}],
        "warnings": ["the attached machine"],
        "n": 1,
    }


def test_of_several_each_is_called_what_it_is() -> None:
    rows = [{"attached": None, "detail": "the VM waits"}, {"attached": {}, "detail": "the VM waits"}]
    assert [row["detail"] for row in kind.in_json(rows)] == ["the VM waits", "the attached machine waits"]


def test_a_command_says_it_of_the_instance_that_it_is_about(home: Home) -> None:
    paths = home.instance("box")
    paths.ensure()
    before = agentctl("--instance", "box", "mounts")
    paths.attached.write_text(IS_ONE)
    after = agentctl("--instance", "box", "mounts")
    assert "VM" not in after.stdout + after.stderr
    assert before.returncode == after.returncode
