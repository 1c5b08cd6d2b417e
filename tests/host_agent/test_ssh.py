"""What ssh is told: a key that is made once, and a way to the VM that ssh itself understands."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import ssh
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import DialTcp
from protocol.errors import ErrorCode, OpenRefused
from protocol.link import Hello, Incoming, Link, Role, Service
from tests.host_agent.command_line import agentctl, said


def ssh_sees(config: str, name: str, folder: Path) -> dict[str, str]:
    """How ssh itself reads the section."""
    file = folder / "ssh config"
    file.write_text(config)
    shown = subprocess.run(
        ["ssh", "-G", "-F", str(file), name], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    return dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)


def test_there_is_one_key_whoever_asks_first(instance: InstancePaths) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: ssh.public_key(instance), range(16)))
    assert len(keys) == 1
    assert keys.pop().startswith("ssh-ed25519 ")
    assert instance.ssh_key.stat().st_mode & 0o777 == 0o600
    assert list(instance.directory.iterdir()) == [instance.ssh_key]


def test_without_ssh_keygen_there_is_none_and_nothing_else_misses_it(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(instance.directory))
    assert ssh.authorized_keys(instance) == []
    done = agentctl("ssh-config")
    assert said(done)[0] == "error: ssh-keygen is not installed"
    assert "openssh-client" in said(done)[1]
    assert done.returncode == ExitCode.DEPENDENCY


def test_a_key_that_is_none_is_a_sentence(instance: InstancePaths) -> None:
    instance.ssh_key.write_text("no key")
    instance.ssh_key.chmod(0o600)
    with pytest.raises(UserError, match="ssh-keygen failed: "):
        ssh.public_key(instance)
    assert ssh.authorized_keys(instance) == []


@pytest.mark.parametrize("name", ["default", "dev"])
def test_ssh_understands_what_it_is_told(home: Home, tmp_path: Path, name: str) -> None:
    done = agentctl("--instance", name, "ssh-config")
    assert done.returncode == 0
    host = "agentctl" if name == "default" else f"agentctl-{name}"
    seen = ssh_sees(done.stdout, host, tmp_path)
    assert seen["user"] == ssh.guest_user()
    assert seen["identityfile"] == str(home.instance(name).ssh_key)
    assert seen["proxycommand"].startswith("env ")
    assert f"AGENTCTL_HOME={home.root}" in seen["proxycommand"]
    assert seen["proxycommand"].endswith(f"--instance {name} ssh-proxy")
    # It runs from anywhere, and says what is wrong; what ssh shows is ours.
    ran = subprocess.run(
        ["ssh", "-F", str(tmp_path / "ssh config"), host, "true"],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=30,
        check=False,
    )
    assert ran.returncode == 255
    assert f"instance {name} is not running" in ran.stderr


def test_folders_with_odd_names_stay_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Home
) -> None:
    odd = Home(home.root / "it's 100% odd")
    paths = odd.instance()
    odd.ensure()
    paths.ensure()
    seen = ssh_sees(ssh.config(odd, paths), "agentctl", tmp_path)
    assert seen["identityfile"] == str(paths.ssh_key).replace("%", "%%")
    assert "100%% odd" in seen["proxycommand"]


def test_the_installed_program_is_what_ssh_runs(
    instance: InstancePaths, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "agentctl"
    program.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "ssh-config"])
    monkeypatch.setattr(Home, "usual", classmethod(lambda cls: home))
    assert f"  ProxyCommand {program} --instance default ssh-proxy\n" in ssh.config(home, instance)


@pytest.mark.parametrize("listens", [True, False])
async def test_stdin_and_stdout_are_the_connection(monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    service = Service()

    async def sshd(target: DialTcp, incoming: Incoming) -> None:
        assert target == ssh.SSHD
        if not listens:
            raise OpenRefused(ErrorCode.UNREACHABLE, "nobody listens on port 22")
        stream = await incoming.accept()
        await stream.send_all(b"SSH-2.0 ")
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.send_eof()

    service.on_stream(DialTcp, sshd)
    ours, theirs = trio.testing.memory_stream_pair()
    host = Link(ours, Role.HOST, Service(), Hello(name="host"))
    guest = Link(theirs, Role.GUEST, service, Hello(name="guest"))
    client, end = socket.socketpair()
    with client, end, end.makefile("rb") as stdin, end.makefile("wb") as stdout, trio.fail_after(20):
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.run)
            await nursery.start(host.run)
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            if listens:
                await ssh.relay(host)
            else:
                with pytest.raises(UserError, match="the VM's SSH server does not answer: nobody listens"):
                    await ssh.relay(host)
            await host.goodbye()
        stdin.close()
        stdout.close()
        end.close()
        if listens:
            assert client.recv(100) == b"SSH-2.0 hello"
