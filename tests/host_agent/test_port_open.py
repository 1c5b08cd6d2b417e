"""What is opened in the browser, and why it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from host_agent import port_open
from host_agent.errors import ExitCode, UserError
from protocol.api import Forward, ForwardState, Proto

ROW = Forward(Proto.TCP, "0.0.0.0", 80, "localhost", 10080, ForwardState.LISTENING)
OTHER = Forward(Proto.TCP, "::", 10080, "localhost", 9090, ForwardState.LISTENING)
TAKEN = replace(ROW, guest_port=81, host_port=81, state=ForwardState.CONFLICT, reason="port 81 is in use")
INSIDE = replace(ROW, guest_port=22, host_address="", host_port=0, state=ForwardState.IGNORED, reason="SSH")
DATAGRAMS = replace(ROW, proto=Proto.UDP, guest_port=53, host_port=53)
ROWS = [INSIDE, DATAGRAMS, TAKEN, OTHER, ROW]


@pytest.mark.parametrize(
    ("port", "address"),
    [
        (80, "http://localhost:10080"),  # the guest's
        (10080, "http://localhost:10080"),  # the host's goes before the guest's
        (9090, "http://localhost:9090"),
    ],
)
def test_a_port_of_the_host_or_else_of_the_guest(port: int, address: str) -> None:
    assert port_open.url(ROWS, port) == address


@pytest.mark.parametrize(
    ("host_address", "address"),
    [
        ("0.0.0.0", "http://localhost:80"),
        ("192.168.1.7", "http://192.168.1.7:80"),
        ("fd00::7", "http://[fd00::7]:80"),
    ],
)
def test_where_it_is_on_the_host(host_address: str, address: str) -> None:
    assert port_open.url([replace(ROW, host_address=host_address, host_port=80)], 80) == address


@pytest.mark.parametrize(
    ("port", "message", "hint"),
    [
        (81, "port 81 is not on this machine: port 81 is in use", "see: agentctl ports --all"),
        (22, "port 22 is not on this machine: SSH", "see: agentctl ports --all"),
        (53, "nothing in the VM listens on port 53", "see: agentctl ports"),
        (1, "nothing in the VM listens on port 1", "see: agentctl ports"),
    ],
)
def test_what_is_wrong_is_said(port: int, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        port_open.url(ROWS, port)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_no_browser_opens_a_unix_socket() -> None:
    with pytest.raises(UserError, match="unix socket"):
        port_open.url([replace(ROW, host_address="/run/web.sock", host_port=0)], 80)


def script(folder: Path, text: str) -> None:
    for name in ("xdg-open", "open"):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


def test_the_browser_is_given_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    script(tmp_path, f'echo "$1" >{tmp_path}/opened')
    port_open.show("http://localhost:80")
    assert (tmp_path / "opened").read_text() == "http://localhost:80\n"
    script(tmp_path, "exit 3")
    with pytest.raises(UserError) as caught:
        port_open.show("http://localhost:80")
    assert caught.value.hint == "open it yourself: http://localhost:80"


def test_without_a_program_for_it_the_address_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        port_open.show("http://localhost:80")
    assert caught.value.exit_code is ExitCode.DEPENDENCY
    assert caught.value.hint == "open it yourself: http://localhost:80"
