"""What known_hosts files say of a machine."""

from __future__ import annotations

import base64
import hashlib
import hmac
from functools import cache
from pathlib import Path

import asyncssh
import pytest

from host_agent.remote.known_hosts import Known, listed_as, look_up, remember


@cache
def key(number: int, kind: str = "ssh-ed25519") -> asyncssh.SSHKey:
    return asyncssh.generate_private_key(kind).convert_to_public()


def text(public: asyncssh.SSHKey) -> str:
    return public.export_public_key().decode().strip()


def hashed(name: str) -> str:
    """As HashKnownHosts writes it (ssh-keygen -H)."""
    salt = b"01234567890123456789"
    value = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(value).decode()}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


def test_a_name_at_the_standard_port(file: Path) -> None:
    file.write_text(f"box,10.0.0.9 {text(key(1))}\n")
    assert look_up([file], "box", 22) == Known((key(1),), (), (), True)
    assert look_up([file], "BOX", 22).same_name
    assert look_up([file], "10.0.0.9", 22).same_name
    assert not look_up([file], "box2", 22).same_name


def test_a_name_at_another_port_is_another_machine_that_may_have_the_same_key(file: Path) -> None:
    file.write_text(f"box {text(key(1))}\n[box]:2222 {text(key(2))}\n")
    assert look_up([file], "box", 22).keys == (key(1),)
    assert look_up([file], "box", 2222) == Known((key(2), key(1)), (), (), True)
    assert look_up([file], "box", 2223) == Known((key(1),), (), (), False)


def test_an_alias_is_the_name_whatever_the_port(file: Path) -> None:
    file.write_text(f"box {text(key(1))}\nthe-box {text(key(2))}\n")
    assert look_up([file], "box", 2222, "the-box") == Known((key(2),), (), (), True)
    assert listed_as("box", 2222, "the-box") == "the-box"
    assert listed_as("Box", 2222) == "[box]:2222"
    assert listed_as("Box", 22) == "box"


def test_hashed_names_patterns_and_several_files(file: Path, tmp_path: Path) -> None:
    file.write_text(
        f"{hashed('[box]:2222')} {text(key(1))}\n*.example.org,!evil.example.org {text(key(2))}\n"
    )
    (system := tmp_path / "system").write_text(f"box.example.org {text(key(3))}\n")
    files = [file, tmp_path / "missing", system]
    assert look_up(files, "box", 2222) == Known((key(1),), (), (), True)
    assert set(look_up(files, "box.example.org", 22).keys) == {key(2), key(3)}
    assert look_up(files, "evil.example.org", 22).keys == ()


def test_authorities_and_revoked_keys(file: Path) -> None:
    file.write_text(f"@cert-authority *.org {text(key(1))}\n@revoked * {text(key(2))}\n")
    known = look_up([file], "box.org", 2222)
    # A pattern for names without a port says nothing of one with a port, and is found without it.
    assert known.authorities == (key(1),)
    assert known.revoked == (key(2),)
    assert not known.same_name
    assert known.algorithms[0] == "ssh-ed25519-cert-v01@openssh.com"


def test_lines_that_cannot_be_read_void_nothing_else(file: Path) -> None:
    file.write_bytes(
        b"\xff\xfe nonsense\n# a comment\n\nonly-a-name\n@unknown box ssh-ed25519 AAAA\nbox ssh-ed25519 AAAA\n"
        + f"box {text(key(1))}\n".encode()
    )
    assert look_up([file], "box", 22).keys == (key(1),)


def test_the_kinds_of_key_that_are_known_are_asked_for_first(file: Path) -> None:
    file.write_text(f"box {text(key(1, 'ecdsa-sha2-nistp384'))}\n")
    algorithms = look_up([file], "box", 22).algorithms
    assert algorithms[0] == "ecdsa-sha2-nistp384"
    assert set(algorithms) > {"ssh-ed25519", "rsa-sha2-512"}
    assert not any("cert" in name for name in algorithms)


@pytest.mark.parametrize("before", ["", "box2 ssh-ed25519 AAAA\n", "# no end of line"])
def test_what_is_remembered_is_found(tmp_path: Path, before: str) -> None:
    file = tmp_path / ".ssh" / "known_hosts"
    if before:
        file.parent.mkdir()
        file.write_text(before)
    remember(file, listed_as("box", 2222), key(1))
    remember(file, listed_as("box", 22), key(2))
    assert look_up([file], "box", 2222).keys == (key(1), key(2))
    assert file.read_text().startswith(before)
    if not before:
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
