"""OpenSSH's client as the peers of a benchmark use it: with Lima's options, and nothing of the user's."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.bench.instance import Instance

#: Lima's, where the CPU has AES instructions (QEMU's emulated one says that it has).
CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"


PORT = 2022
"""Of an sshd of the bench's in the guest: forwards to the guest's own, 22, agentctl takes for what it left, and removes."""


def command(key: Path, port: int, script: str) -> list[str]:
    """Root's shell in the guest, whose sshd answers at ``port`` of localhost, runs ``script``."""
    return [*options(key, port), "root@127.0.0.1", "--", script]


def forwarding(key: Path, port: int, *, listen: int, target: int, user: str = "root") -> list[str]:
    """``ssh -L``: ``listen`` of localhost leads to ``target`` of the localhost of the sshd at ``port``."""
    # fmt: off
    return [
        *options(key, port), "-N",
        "-o", "ExitOnForwardFailure=yes",
        "-L", f"127.0.0.1:{listen}:127.0.0.1:{target}",
        f"{user}@127.0.0.1",
    ]
    # fmt: on


def new_key(path: Path) -> Path:
    """An ed25519 key without a passphrase, in place of an older one; its public half is beside it."""
    for old in (path, path.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def authorize(instance: Instance) -> Path:
    """Let this host into the guest as root, by an sshd at ``PORT``; the key for it."""
    key = new_key(instance.directory / "key")
    instance.guest(
        "umask 077; mkdir -p /etc/agentctl; chmod 755 /etc/agentctl; cat >/etc/agentctl/authorized_keys\n"
        f'mkdir -p -m 755 /run/sshd; [ -n "$(ss -Hltn sport = :{PORT})" ] || /usr/sbin/sshd -p {PORT}',
        input=key.with_suffix(".pub").read_bytes(),
    )
    return key


def options(key: Path, port: int) -> list[str]:
    # fmt: off
    return [
        "ssh", "-F", "/dev/null", "-T",
        "-i", str(key), "-p", str(port),
        "-o", "IdentitiesOnly=yes",
        "-o", "PreferredAuthentications=publickey",
        "-o", "StrictHostKeyChecking=no",
        "-o", "UserKnownHostsFile=/dev/null",
        "-o", "LogLevel=ERROR",
        "-o", "BatchMode=yes",
        "-o", "Compression=no",
        "-o", f"Ciphers={CIPHERS}",
    ]
    # fmt: on
