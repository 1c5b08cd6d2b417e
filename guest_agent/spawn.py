"""Starting a process in the guest as one of its users, on pipes or on a terminal.

The law: what the process sees is what a login would give it (user, groups, home, environment), plus
what was asked for; and it leads a process group of its own, so that it can be ended with all it started.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import signal
import subprocess
import termios
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from guest_agent.host_network import login_environment
from protocol.api import Exec, WindowSize

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""What a shell exits with when it cannot run, or cannot find, a command (POSIX, XCU 2.8.2)."""

ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
"""Debian's ENV_SUPATH and ENV_PATH (/etc/login.defs)."""

OF_THE_LOGIN = ("LANG", "PATH", "XDG_RUNTIME_DIR")
"""What an agent that is not root passes on of its own environment; by the last one systemctl --user is found, and a
Docker without root."""

HANG_UP_GRACE = 3.0
"""Seconds between SIGHUP and SIGKILL for a process whose user has gone."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user as a login knows it."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str


class CannotExecute(Exception):
    """There is no process; ``code`` is what a shell would exit with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def find_account(name: str) -> Account:
    """The account of a user, or of whoever runs this process for an empty name. Raises ``KeyError``."""
    try:
        entry = pwd.getpwnam(name) if name else pwd.getpwuid(os.geteuid())
    except KeyError:
        if name:
            raise
        return _nameless_account()
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    shell = entry.pw_shell or "/bin/sh"
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(groups), entry.pw_dir, shell)


def _nameless_account() -> Account:
    """Ours where no directory knows our number, as in containers."""
    uid, said = os.geteuid(), os.environ.get
    return Account(
        str(uid), uid, os.getegid(), tuple(os.getgroups()), said("HOME", "/"), said("SHELL", "/bin/sh")
    )


def may_become(account: Account) -> bool:
    """Root may become anybody; anybody else is only himself."""
    return os.geteuid() in (0, account.uid)


def environment(account: Account, target: Exec) -> dict[str, str]:
    """The environment of a login of ``account``, with what ``target`` adds."""
    base = {
        "HOME": account.home,
        "LOGNAME": account.name,
        "PATH": USER_PATH if account.uid else ROOT_PATH,
        "SHELL": account.shell,
        "USER": account.name,
    }
    if target.tty is not None:
        base["TERM"] = "xterm-256color"
    if (
        os.geteuid()
    ):  # ours began with a login of that user, on a machine that may have its own ideas of all this
        base |= {name: os.environ[name] for name in OF_THE_LOGIN if name in os.environ}
    return {"LANG": "C.UTF-8", **login_environment(), **base, **target.env}


def working_directory(account: Account, target: Exec) -> str:
    """The first that exists of what was asked for, the home and the root. Raises ``CannotExecute`` where another one
    will not do."""
    wanted = os.path.join(account.home, target.cwd) if target.cwd else ""
    if wanted and target.cwd_required and not os.path.isdir(wanted):
        raise CannotExecute(NOT_EXECUTABLE, f"{wanted}: No such folder")
    return next((path for path in (wanted, account.home) if path and os.path.isdir(path)), "/")


def find_program(name: str, search: str, cwd: str) -> str:
    """The absolute path of a command, looked for as a shell in ``cwd`` would. Raises ``CannotExecute``."""
    if "/" in name:
        found = os.path.join(cwd, name)
        if not os.path.exists(found):
            raise CannotExecute(NOT_FOUND, f"{name}: No such file or directory")
        if os.path.isdir(found):
            raise CannotExecute(NOT_EXECUTABLE, f"{name}: Is a directory")
        if not os.access(found, os.X_OK):
            raise CannotExecute(NOT_EXECUTABLE, f"{name}: Permission denied")
        return found
    places = os.pathsep.join(os.path.join(cwd, place) for place in search.split(os.pathsep))
    if not name or (match := shutil.which(name, path=places)) is None:
        raise CannotExecute(NOT_FOUND, f"{name}: command not found")
    return match


@dataclass(slots=True)
class Child:
    """A running process and our ends of its streams; ``terminal`` is the pty's master or -1."""

    process: trio.Process
    stdin: trio.abc.SendStream
    outputs: list[trio.abc.ReceiveStream]
    terminal: int = -1

    async def end_input(self) -> None:
        """End of input: the pipe is closed, at a terminal it is ^D."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            if self.terminal >= 0:
                await self.stdin.send_all(b"\x04")
            else:
                await self.stdin.aclose()

    def resize(self, size: WindowSize) -> None:
        """Set the window's size; the kernel tells the foreground job with SIGWINCH."""
        if self.terminal >= 0:
            termios.tcsetwinsize(self.terminal, (size.rows, size.columns))

    def signal(self, number: int) -> None:
        """Signal the terminal's foreground job, or the process group. Unknown signals are ignored."""
        group = self.process.pid
        if self.terminal >= 0:
            with suppress(OSError):
                group = os.tcgetpgrp(self.terminal) or group
        with suppress(OSError):
            os.killpg(group, number)

    async def aclose(self) -> None:
        """Close our ends; a process that still runs is hung up on, and after a grace killed."""
        with trio.CancelScope(shield=True):
            self.terminal = -1
            for resource in (self.stdin, *self.outputs):
                await trio.aclose_forcefully(resource)
            if self.process.returncode is None:
                await self._hang_up()

    async def _hang_up(self) -> None:
        for number in (signal.SIGHUP, signal.SIGCONT):  # a stopped process cannot act on a SIGHUP
            self._signal_all(number)
        with trio.move_on_after(HANG_UP_GRACE):
            await self.process.wait()
            return
        self._signal_all(signal.SIGKILL)
        await self.process.wait()

    def _signal_all(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:  # it has not come to leading a group yet
            self.process.send_signal(number)


def _identity(account: Account) -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": account.groups}


async def spawn(target: Exec, account: Account) -> Child:
    """Start the process of ``target``. Raises ``CannotExecute``."""
    env = environment(account, target)
    argv = target.argv or [account.shell, "-l"]

    def find() -> tuple[str, str]:
        cwd = working_directory(account, target)
        return cwd, find_program(argv[0], env["PATH"], cwd)

    # In a thread: either may be on a mount whose host does not answer just now, and the agent's others shall not wait.
    cwd, program = await trio.to_thread.run_sync(find, abandon_on_cancel=True)
    options = {"cwd": cwd, "env": env, **_identity(account)}
    start = _on_pipes if target.tty is None else _on_terminal
    try:
        return await start(target, account, program, argv, options)
    except PermissionError as error:
        raise CannotExecute(NOT_EXECUTABLE, f"{argv[0]}: {error.strerror}") from error
    except FileNotFoundError as error:  # the interpreter in its first line, or its loader
        raise CannotExecute(NOT_FOUND, f"{argv[0]}: cannot execute: required file not found") from error
    except (OSError, ValueError) as error:
        raise CannotExecute(NOT_EXECUTABLE, f"{argv[0]}: {error}") from error


async def _on_pipes(
    target: Exec, account: Account, program: str, argv: list[str], options: dict[str, Any]
) -> Child:
    process: trio.Process = await trio.lowlevel.open_process(
        argv,
        executable=program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )
    outputs = [output for output in (process.stdout, process.stderr) if output is not None]
    assert process.stdin is not None
    return Child(process, process.stdin, outputs)


async def _on_terminal(
    target: Exec, account: Account, program: str, argv: list[str], options: dict[str, Any]
) -> Child:
    """``setsid -c`` (as busybox has it, too) makes the session and takes the terminal: it is a small C program, where a
    ``preexec_fn`` would run Python between fork and exec of a process with threads."""
    setsid = shutil.which("setsid", path=ROOT_PATH)
    if setsid is None:
        raise CannotExecute(NOT_FOUND, "setsid: command not found (a terminal needs util-linux)")
    master, slave = os.openpty()
    try:
        _prepare_terminal(slave, account, target.tty or WindowSize(24, 80))
        process: trio.Process = await trio.lowlevel.open_process(
            [setsid, "-c", program, *argv[1:]], stdin=slave, stdout=slave, stderr=slave, **options
        )
    except BaseException:
        os.close(master)
        raise
    finally:
        os.close(slave)
    output, keyboard = trio.lowlevel.FdStream(master), trio.lowlevel.FdStream(os.dup(master))
    return Child(process, keyboard, [output], terminal=master)


def _prepare_terminal(slave: int, account: Account, size: WindowSize) -> None:
    termios.tcsetwinsize(slave, (size.rows, size.columns))
    if os.geteuid() == 0:
        # As login(1) leaves it: the user's own, and write(1)'s by the group.
        with suppress(KeyError):
            os.fchown(slave, account.uid, grp.getgrnam("tty").gr_gid)
        os.fchmod(slave, 0o620)
