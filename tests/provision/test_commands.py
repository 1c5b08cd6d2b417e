"""How the build gets to own files as root, with stand-ins for unshare, chown and sudo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from provision import commands
from provision.commands import Privilege
from provision.errors import ProvisionError

NAMESPACE = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
ALLOWED, DENIED = "exit 0", "echo 'chown: Operation not permitted' >&2; exit 1"


class Machine:
    """The programs that an ordinary user finds."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.temporary = base / "temporary files"
        self.temporary.mkdir()
        (base / "bin").mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setenv("PATH", f"{base / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("TMPDIR", str(self.temporary))
        for name in ("http_proxy", "https_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        self.has("newuidmap", ALLOWED)
        self.has("unshare", NAMESPACE)
        self.has("stat", "echo 1:1")

    def has(self, name: str, script: str) -> None:
        path = self.base / "bin" / name
        path.write_text(f'#!/bin/sh\necho "$*" >>"{self.base}/{name}-calls"\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.base / f"{name}-calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_root_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert commands.find_privilege() == Privilege((), ("mmdebstrap", "--mode=root"))


def test_a_namespace_in_which_files_can_be_given_away_is_used(machine: Machine) -> None:
    machine.has("chown", ALLOWED)
    machine.has("sudo", ALLOWED)
    privilege = commands.find_privilege()
    assert privilege.prefix == ("unshare", "--map-auto", "--map-root-user", "--")
    assert privilege.mmdebstrap == ("mmdebstrap", "--mode=unshare")
    (chown,) = machine.calls("chown")
    assert chown.startswith(f"1:1 {machine.temporary}/")
    assert machine.calls("sudo") == []
    assert list(machine.temporary.iterdir()) == []


def test_a_namespace_without_capabilities_is_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ubuntu's AppArmor: unshare works, and nothing that it is for."""
    machine.has("chown", DENIED)
    machine.has("sudo", ALLOWED)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    words = ("sudo", "-n", "env", f"TMPDIR={machine.temporary}", "http_proxy=http://proxy:3128")
    assert commands.find_privilege() == Privilege(words, (*words, "mmdebstrap", "--mode=root"))
    assert machine.calls("sudo") == ["-n true"], "no password is asked for where none is needed"
    assert list(machine.temporary.iterdir()) == []


def test_a_password_is_asked_for_where_one_is_needed(machine: Machine) -> None:
    machine.has("chown", DENIED)
    machine.has("sudo", '[ "$1" = -v ]')
    assert commands.find_privilege().mmdebstrap[:3] == ("sudo", "-n", "env")
    assert machine.calls("sudo") == ["-n true", "-v"]


def test_without_any_of_them_there_is_a_hint(machine: Machine) -> None:
    machine.has("chown", DENIED)
    machine.has("sudo", "exit 1")
    with pytest.raises(ProvisionError, match="neither user namespaces nor sudo") as caught:
        commands.find_privilege()
    assert "/etc/subuid" in caught.value.hint


def test_temporary_files_are_on_a_disk_unless_the_user_says_otherwise(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR")
    machine.has("chown", DENIED)
    machine.has("sudo", ALLOWED)
    assert commands.find_privilege().prefix[3] == "TMPDIR=/var/tmp"
