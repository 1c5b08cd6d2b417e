"""The whole way over a shell instead of a connection: real login shells with real startup files, real disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from host_agent.errors import ExitCode, UserError
from host_agent.remote import install as module
from host_agent.remote.install import Installed, install
from host_agent.remote.payload import Payload, pack

CHECK = {"format": 1, "python": "3.11.2", "uid": 1000, "user": "ada", "home": "/home/ada"}
#: What stands for the agent.
ENTRY = f"""
def main(words):
    if words[0] == "check":
        print("agentctl-check", words[2], {json.dumps(json.dumps(CHECK))})
    else:
        print("ran", words)
    return 0
"""
SHELLS = ("sh", "bash", "zsh", "fish", "tcsh")
STARTUP = (".bashrc", ".zshenv", ".tcshrc", ".config/fish/config.fish")


def packed(**more: bytes) -> Payload:
    files = {"guest_agent/__init__.py": b"", "guest_agent/remote/__init__.py": b""}
    return pack(files | {"guest_agent/remote/__main__.py": ENTRY.encode()} | more)


PAYLOAD = packed()


@dataclass
class Finished:
    status: int
    out: bytes
    err: bytes


@dataclass
class Shell:
    """A machine whose sshd starts ``shell -c COMMAND``, as sshd does, with a home of its own."""

    home: Path
    shell: str = "sh"
    path: str = os.defpath
    prefix: tuple[str, ...] = ()
    spoil: Callable[[bytes], bytes] = lambda data: data
    before: bytes = b""
    after: bytes = b""
    ran: list[str] = field(default_factory=list)

    async def run(self, command: str, input: bytes = b"", timeout: float = 60.0) -> Finished:
        self.ran.append(command)
        environment = {
            "HOME": str(self.home),
            "PATH": self.path,
            "SSH_CLIENT": "127.0.0.1 1 2",
            "USER": "ada",
        }
        shell = shutil.which(self.shell)
        assert shell is not None
        with trio.fail_after(timeout):
            done = await trio.run_process(
                [*self.prefix, shell, "-c", command],
                stdin=self.spoil(input),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment,
                cwd=self.home,
            )
        return Finished(done.returncode, self.before + done.stdout + self.after, done.stderr)

    @property
    def cache(self) -> Path:
        return self.home / ".cache/agentctl"

    @property
    def archive(self) -> Path:
        return self.cache / f"agent-{PAYLOAD.digest[:16]}.pyz"

    def noisy(self) -> None:
        """Greets from every startup file there is, without ending its line."""
        for name in STARTUP:
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            (self.home / name).write_text('printf "{ agentctl-check 7 {} Welcome "\n')


@pytest.fixture
def machine(tmp_path: Path) -> Shell:
    home = tmp_path / "it is a home"
    home.mkdir()
    path = tmp_path / "bin"
    path.mkdir()
    (path / "python3").symlink_to(sys.executable)
    return Shell(home, path=f"{path}:{os.defpath}")


def quiet(message: str) -> None:
    """For those who do not look at the progress."""


async def refused(machine: Shell, payload: Payload = PAYLOAD) -> UserError:
    with pytest.raises(UserError) as failure:
        await install(machine, payload, quiet)
    assert failure.value.message.isprintable()
    return failure.value


def sent(machine: Shell) -> list[int]:
    """How many bytes each command announced."""
    return [int(re.findall(r'"\$p" [0-9a-f]+ [0-9a-f]+ ([0-9]+);', command)[0]) for command in machine.ran]


async def test_an_archive_is_sent_once(machine: Shell) -> None:
    said: list[str] = []
    first = await install(machine, PAYLOAD, said.append)
    assert (first.capabilities.user, first.capabilities.uid) == ("ada", 1000)
    assert len(said) == 2
    assert said[1].startswith("sending the agent")
    assert machine.archive.read_bytes() == PAYLOAD.data
    assert machine.archive.stat().st_mode & 0o777 == 0o600
    assert machine.cache.stat().st_mode & 0o777 == 0o700
    assert await install(machine, PAYLOAD, said.append) == first
    # The second time it costs one question.
    assert sent(machine) == [0, len(PAYLOAD.data), 0]
    done = await machine.run(first.command("connect", "files", "it's\ta session"))
    assert (
        done.out.decode() == f"ran {['connect', 'files', chr(39).join(['it', 's']) + chr(9) + 'a session']}\n"
    )


@pytest.mark.parametrize("shell", SHELLS)
async def test_every_login_shell_noisy_as_it_may_be(machine: Shell, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    machine.shell = shell
    machine.before, machine.after = b"\xffmotd\r\nagentctl-check 0 {", b"agentctl-failed x {}\n[exited]"
    machine.noisy()
    for _ in range(2):
        installed = await install(machine, PAYLOAD, quiet)
        assert installed.capabilities.user == "ada"
    done = await machine.run(installed.command("connect", "control", "box-0123"))
    assert b"ran ['connect', 'control', 'box-0123']\n" in done.out


def test_a_command_is_the_same_words_in_every_shell() -> None:
    command = module.look_command("0" * 16, "f" * 64, 10**9)
    assert re.fullmatch(r"sh -c '[^'\\!\n]*'", command)
    # csh's words were 1,024 bytes long.
    assert len(command) < 1000


async def test_a_damaged_archive_is_found_and_replaced(machine: Shell) -> None:
    await install(machine, PAYLOAD, quiet)
    for damaged in (b"", PAYLOAD.data[:-1], PAYLOAD.data[:100] + b"x" + PAYLOAD.data[101:]):
        machine.archive.write_bytes(damaged)
        machine.ran.clear()
        await install(machine, PAYLOAD, quiet)
        assert machine.archive.read_bytes() == PAYLOAD.data
        assert sent(machine) == [0, len(PAYLOAD.data)]


async def test_what_arrives_damaged_is_sent_again_and_never_takes_the_name(machine: Shell) -> None:
    spoilt: list[bytes] = []

    def cut(data: bytes) -> bytes:
        if spoilt or not data.endswith(PAYLOAD.data):
            return data
        spoilt.append(data)
        return data[:-1]

    machine.spoil = cut
    await install(machine, PAYLOAD, quiet)
    assert sent(machine) == [0, len(PAYLOAD.data), len(PAYLOAD.data)]

    shutil.rmtree(machine.cache)
    machine.spoil = lambda data: data[:-1] + b"?" if data.endswith(PAYLOAD.data) else data
    assert "does not arrive" in (await refused(machine)).message
    assert not machine.cache.exists()


async def test_several_hosts_at_once(machine: Shell) -> None:
    found: list[Installed] = []

    async def one() -> None:
        found.append(await install(machine, PAYLOAD, quiet))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(one)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert machine.archive.read_bytes() == PAYLOAD.data
    assert not [path for path in machine.cache.iterdir() if path.name.startswith(".new-")]


async def test_builds_that_nobody_used_for_long_go_and_those_in_use_stay(machine: Shell) -> None:
    long_ago = time.time() - 100 * 24 * 3600
    machine.cache.mkdir(parents=True)
    for name in ("agent-0123456789abcdef.pyz", "agent-0123456789abcde0.pyz", ".new-left.pyz", "notes.txt"):
        (machine.cache / name).touch()
    for name in ("agent-1123456789abcdef", "agent-in-use", "agent-2123456789abcdef"):
        (machine.cache / name / "in").mkdir(parents=True)
    for path in machine.cache.iterdir():
        os.utime(path, (long_ago, long_ago))
    (machine.cache / "agent-0123456789abcde0.pyz").touch()
    held = os.open(machine.cache / "agent-2123456789abcdef", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    try:
        await install(machine, PAYLOAD, quiet)
    finally:
        os.close(held)
    left = {path.name for path in machine.cache.iterdir()}
    assert machine.archive.name in left
    assert len(left) == 6
    assert {"agent-0123456789abcde0.pyz", "notes.txt", "agent-in-use", "agent-2123456789abcdef"} < left


def script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture
def bare(machine: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A machine with a shell, and no Python but what the test puts into its ``bin``."""
    monkeypatch.setattr(module, "PYTHONS", tuple(name for name in module.PYTHONS if name[0] != "/"))
    folder = tmp_path / "bin"
    (folder / "python3").unlink()
    (folder / "sh").symlink_to("/bin/sh")
    machine.path = str(folder)
    machine.shell = "/bin/sh"
    return machine


async def test_a_machine_without_python(bare: Shell) -> None:
    failure = await refused(bare)
    assert failure.message == "the machine has no Python 3.11 or newer"
    assert "python3" in failure.hint
    assert failure.exit_code is ExitCode.DEPENDENCY


async def test_an_old_python(bare: Shell) -> None:
    script(Path(bare.path) / "python3", '[ "$1" = -V ] && echo Python 3.9.2 && exit; exit 1\n')
    assert (await refused(bare)).message.endswith(": its python3 is Python 3.9.2")


async def test_a_python_without_its_whole_library(bare: Shell) -> None:
    script(Path(bare.path) / "python3", '[ "$1" = -V ] && echo Python 3.11.2 && exit; exit 1\n')
    assert (await refused(bare)).message.startswith("Python 3.11.2 on the machine lacks")


async def test_a_newer_python_of_another_name_is_found(bare: Shell) -> None:
    script(Path(bare.path) / "python3", "exit 1\n")
    script(Path(bare.path) / "python3.12", f'exec {shlex.quote(sys.executable)} "$@"\n')
    assert (await install(bare, PAYLOAD, quiet)).capabilities.user == "ada"


async def test_a_users_own_python_is_found(bare: Shell) -> None:
    script(Path(bare.path) / "python3", "exit 1\n")
    own = bare.home / ".local/bin/python3.13"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    assert (await install(bare, PAYLOAD, quiet)).program[0] == str(own)


async def test_a_shell_that_runs_nothing(machine: Shell) -> None:
    machine.shell = "false"
    machine.before = b"\x1b[31mThis account is currently not available.\n"
    failure = await refused(machine)
    assert failure.message.endswith("; it said: This account is currently not available.")


async def test_a_startup_file_that_reads_what_was_sent(machine: Shell) -> None:
    machine.spoil = lambda data: data[data.index(b"\n") + 1 :]
    assert "it said: ValueError" in (await refused(machine)).message


async def test_an_agent_that_does_not_run(machine: Shell) -> None:
    broken = packed(**{"guest_agent/remote/__main__.py": b"raise RuntimeError('out of order')"})
    failure = await refused(machine, broken)
    assert failure.message == "the agent does not run on the machine; it said: RuntimeError: out of order"


@pytest.mark.parametrize(
    "here",
    [
        {"python": "python3"},
        {"python": "/a'b"},
        {"python": "/a\\b"},
        {"python": 7},
        {"archive": "/a\nb"},
        {"archive": ""},
    ],
)
async def test_a_machine_that_lies(machine: Shell, here: dict[str, object]) -> None:
    class Liar(Shell):
        async def run(self, command: str, input: bytes = b"", timeout: float = 60.0) -> Finished:
            nonce = re.findall(r'"\$p" ([0-9a-f]+) ', command)[0]
            answer = json.dumps({"python": "/usr/bin/python3", "archive": "/x.pyz"} | here)
            said = f"agentctl-here {nonce} {answer}\nagentctl-check {nonce} {json.dumps(CHECK)}\n"
            return Finished(0, said.encode(), b"")

    assert "cannot be part of a command" in (await refused(Liar(machine.home))).message


async def test_endless_noise_is_not_kept(machine: Shell) -> None:
    machine.before = b"\xff\n\x1b[" + os.urandom(300_000)
    assert (await install(machine, PAYLOAD, quiet)).capabilities.user == "ada"
    machine.before = b"x" * module.MAX_NOISE
    assert len((await refused(machine)).message) < 1000


def on_tmpfs(options: str) -> tuple[str, ...]:
    """Words before a command, for a home on a filesystem of its own; each command has a new one."""
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    mount = f'mount -t tmpfs -o {options} tmpfs "$HOME" && cd "$HOME" && exec "$@"'
    return ("unshare", "--mount", *user, "sh", "-c", mount, "sh")


def can_mount(home: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(
            [*on_tmpfs("size=1m"), "true"], env={"HOME": str(home), "PATH": os.defpath}, capture_output=True
        )
        return done.returncode == 0
    return False


@pytest.fixture
def disk(machine: Shell) -> Shell:
    if not can_mount(machine.home):
        pytest.skip("mounting is not permitted here")
    return machine


async def test_a_full_disk(disk: Shell) -> None:
    large = packed(**{"guest_agent/large.py": os.urandom(400_000)})
    for size in ("200k", "500k"):  # no room for the archive; room for that, but not for what is in it
        disk.prefix = on_tmpfs(f"size={size}")
        failure = await refused(disk, large)
        assert failure.message.startswith(
            "there is no room for the agent on the machine: No space left on device"
        )
        assert failure.exit_code is ExitCode.RESOURCES
        assert ".cache/agentctl/agent-" in failure.message


async def test_a_home_that_is_read_only(disk: Shell) -> None:
    disk.prefix = on_tmpfs("ro")
    failure = await refused(disk)
    assert failure.message.startswith("the agent cannot be put on the machine: Read-only file system")


async def test_a_home_that_is_missing_or_no_folder(machine: Shell) -> None:
    (machine.home / ".cache").touch()
    assert os.strerror(errno.ENOTDIR) in (await refused(machine)).message
