from __future__ import annotations

import os
import pwd
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from guest_agent import execute, spawn
from protocol import execio
from protocol.api import Exec, WindowSize
from protocol.errors import ErrorCode, OpenRefused
from protocol.execio import Exit, Resize, Signal, Stderr, Stdin, StdinEof, Stdout
from protocol.link import Link, MuxStream
from tests.descriptors import open_descriptors

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


class Process:
    """The host's side of one exec stream."""

    def __init__(self, stream: MuxStream) -> None:
        self.stream = stream
        self.stdout = self.stderr = b""
        self.code: int | None = None
        self._decoder = execio.Decoder()

    async def send(self, *packets: execio.Packet) -> None:
        for packet in packets:
            await self.stream.send_all(execio.encode(packet))

    async def _hear(self) -> bool:
        if not (data := await self.stream.receive_some()):
            return False
        for packet in self._decoder.receive_data(data):
            assert self.code is None, f"{packet} after the exit code"
            match packet:
                case Stdout(data):
                    self.stdout += data
                case Stderr(data):
                    self.stderr += data
                case Exit(code):
                    self.code = code
        return True

    async def until(self, text: bytes) -> None:
        with trio.fail_after(10):
            while text not in self.stdout:
                assert await self._hear(), f"ended with {self.stdout!r}"

    async def end(self) -> Process:
        with trio.fail_after(20):
            while await self._hear():
                pass
            await self.stream.send_eof()
        await self.stream.aclose()
        return self


async def start(host: Link, *argv: str, **options: object) -> Process:
    return Process(await host.open(Exec(list(argv), **options)))  # type: ignore[arg-type]


async def run(host: Link, *argv: str, **options: object) -> Process:
    process = await start(host, *argv, **options)
    await process.send(StdinEof())
    return await process.end()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie of somebody else's does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def gone(pid: int) -> None:
    with trio.fail_after(10):
        while alive(pid):
            await trio.sleep(0.01)


async def test_output_errors_and_exit_code(host: Link) -> None:
    process = await run(host, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (process.stdout, process.stderr, process.code) == (b"out\n", b"err\n", 7)


async def test_input_reaches_the_process_and_ends(host: Link) -> None:
    process = await start(host, "sort")
    await process.send(Stdin(b"b\n"), Stdin(b"a\n"), StdinEof())
    assert (await process.end()).stdout == b"a\nb\n"


async def test_the_streams_own_end_ends_the_input_too(host: Link) -> None:
    process = await start(host, "cat")
    await process.send(Stdin(b"x"))
    await process.stream.send_eof()
    assert (await process.end()).stdout == b"x"


async def test_all_output_comes_before_the_exit_code(host: Link) -> None:
    process = await run(host, sys.executable, "-c", "import sys; sys.stdout.write('x' * 5_000_000)")
    assert len(process.stdout) == 5_000_000
    assert process.code == 0


async def test_a_host_that_does_not_read_stops_the_writer(host: Link, tmp_path: Path) -> None:
    counter = tmp_path / "written"
    program = (
        "import os, sys\nn = 0\nwhile n < 200:\n"
        "    n += os.write(1, b'x' * 65536) // 65536\n"
        f"    open({str(counter)!r}, 'w').write(str(n))\n"
    )
    process = await start(host, sys.executable, "-c", program)
    before = ""
    with trio.fail_after(20):
        while not (counter.exists() and before and before == counter.read_text()):
            before = counter.read_text() if counter.exists() else ""
            await trio.sleep(0.3)
    assert int(before) < 20
    assert len((await process.end()).stdout) == 200 * 65536


async def test_a_process_that_does_not_read_stops_the_host_and_may_end(host: Link) -> None:
    process = await start(host, "sh", "-c", "echo up; sleep 0.4; exit 3")
    await process.until(b"up")
    chunk = execio.encode(Stdin(b"x" * execio.MAX_DATA))
    with trio.move_on_after(0.2) as scope:
        for _ in range(1000):
            await process.stream.send_all(chunk)
    assert scope.cancelled_caught
    assert (await process.end()).code == 3


async def test_a_process_that_closes_its_input_lives_on(host: Link) -> None:
    process = await start(host, "sh", "-c", "exec <&-; echo closed; sleep 0.2; echo done")
    await process.until(b"closed")
    await process.send(*[Stdin(b"x" * 1000)] * 50, StdinEof())
    assert (await process.end()).stdout == b"closed\ndone\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_signals_and_their_exit_codes(host: Link, number: signal.Signals) -> None:
    process = await start(host, "sh", "-c", "echo up; exec sleep 60")
    await process.until(b"up")
    await process.send(Signal(number))
    assert (await process.end()).code == 128 + number


async def test_an_unknown_signal_is_ignored(host: Link) -> None:
    process = await start(host, "sh", "-c", "echo up; read line; exit 5")
    await process.until(b"up")
    await process.send(Signal(200), Stdin(b"\n"))
    assert (await process.end()).code == 5


async def test_a_background_child_that_holds_the_pipes_does_not_hold_the_exit(host: Link) -> None:
    started = trio.current_time()
    process = await run(host, "sh", "-c", "sleep 30 & echo $!; exit 4")
    os.kill(int(process.stdout), signal.SIGKILL)  # a background job outlives its shell
    assert process.code == 4
    assert trio.current_time() - started < 5


async def test_a_background_child_that_never_stops_talking_does_not_either(
    host: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "BUSY_GRACE", 0.2)
    process = await run(host, "sh", "-c", "yes & echo $! >&2; exit 4")
    os.kill(int(process.stderr), signal.SIGKILL)
    assert process.code == 4


async def test_what_a_child_says_right_after_the_exit_is_heard(host: Link) -> None:
    process = await run(host, "sh", "-c", "(sleep 0.2; echo late) & echo early")
    assert process.stdout == b"early\nlate\n"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["no-such-command"], 127, "agentctl: no-such-command: command not found\n"),
        (["/no/such/file"], 127, "agentctl: /no/such/file: No such file or directory\n"),
        (["/etc/passwd"], 126, "agentctl: /etc/passwd: Permission denied\n"),
        (["/etc"], 126, "agentctl: /etc: Is a directory\n"),
        ([""], 127, "agentctl: : command not found\n"),
    ],
)
@pytest.mark.parametrize("tty", [None, WindowSize(24, 80)])
async def test_commands_that_cannot_run(
    host: Link, argv: list[str], code: int, message: str, tty: WindowSize | None
) -> None:
    process = await run(host, *argv, tty=tty)
    assert (process.code, process.stderr.decode()) == (code, message)


async def test_scripts_without_interpreter_cannot_run(host: Link, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert (await run(host, str(script), cwd="/")).code == 127
    script.write_text("echo no first line\n")
    assert (await run(host, str(script), cwd="/")).code == 126


async def test_a_nul_in_an_argument_is_an_answer_and_not_a_crash(host: Link) -> None:
    assert (await run(host, "echo", "a\0b")).code == 126


async def test_relative_commands_start_from_the_working_directory(host: Link, tmp_path: Path) -> None:
    script = tmp_path / "here"
    script.write_text("#!/bin/sh\necho here in $PWD\n")
    script.chmod(0o755)
    for name, env in (("./here", {}), ("here", {"PATH": ".:/usr/bin:/bin"})):
        process = await run(host, name, cwd=str(tmp_path), env=env)
        assert process.stdout.decode() == f"here in {tmp_path}\n"


async def test_an_unknown_user_is_refused(host: Link) -> None:
    with pytest.raises(OpenRefused) as caught:
        await host.open(Exec(["true"], user="nobody-of-this-name"))
    assert caught.value.code is ErrorCode.NOT_FOUND


@pytest.mark.skipif(os.geteuid() == 0, reason="root may become anybody")
async def test_an_ordinary_user_cannot_become_another(host: Link) -> None:
    with pytest.raises(OpenRefused) as caught:
        await host.open(Exec(["true"], user="root"))
    assert caught.value.code is ErrorCode.DENIED


@AS_ROOT
async def test_another_user_gets_his_ids_groups_and_environment(host: Link) -> None:
    entry = pwd.getpwnam("nobody")
    groups = sorted(set(os.getgrouplist("nobody", entry.pw_gid)))
    script = "id -u; id -g; id -G; echo $USER $LOGNAME $HOME $SHELL; pwd"
    process = await run(host, "sh", "-c", script, user="nobody")
    uid, gid, all_groups, names, cwd = process.stdout.decode().splitlines()
    assert (int(uid), int(gid)) == (entry.pw_uid, entry.pw_gid)
    assert sorted(map(int, all_groups.split())) == groups
    assert names == f"nobody nobody {entry.pw_dir} {entry.pw_shell}"
    assert cwd == "/"  # nobody's home does not exist


async def test_the_environment_is_a_logins_and_not_the_agents(
    host: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "x")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    of_the_machine = {"http_proxy": "http://10.0.2.2:3128", "HOME": "/wrong", "EXTRA": "wrong"}
    monkeypatch.setattr(spawn, "login_environment", lambda: of_the_machine)
    process = await run(host, "env", env={"LANG": "de_DE.UTF-8", "EXTRA": "a=b c"})
    env = dict(line.split("=", 1) for line in process.stdout.decode().splitlines())
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert set(env) - {"PWD", "SHLVL", "_"} == {
        "EXTRA", "HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER", "http_proxy",
    }  # fmt: skip
    assert (env["USER"], env["LANG"], env["EXTRA"]) == (user, "de_DE.UTF-8", "a=b c")
    assert env["HOME"] != "/wrong"


@pytest.mark.skipif(os.geteuid() == 0, reason="root has the path of root")
async def test_an_ordinary_user_finds_what_their_login_found(
    host: Link, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tool-of-mine").write_text("#!/bin/sh\necho $XDG_RUNTIME_DIR\n")
    (tmp_path / "tool-of-mine").chmod(0o755)
    monkeypatch.setenv("PATH", f"/usr/bin:/bin:{tmp_path}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/mine")
    assert (await run(host, "tool-of-mine")).stdout == b"/run/user/mine\n"


async def test_who_has_no_name_has_a_home_and_a_shell_all_the_same(
    host: Link, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SHELL", raising=False)
    process = await run(host, "sh", "-c", "pwd; id -u; echo $USER $SHELL")
    assert process.stdout.decode() == f"{tmp_path}\n{os.geteuid()}\n{os.geteuid()} /bin/sh\n"


def test_a_working_directory_is_seen_from_the_home(tmp_path: Path) -> None:
    account = replace(spawn.find_account(""), home=str(tmp_path))
    (tmp_path / "src").mkdir()
    for cwd, where in (("src", tmp_path / "src"), ("", tmp_path), ("none", tmp_path), ("/", Path("/"))):
        assert spawn.working_directory(account, Exec(["pwd"], cwd=cwd)) == str(where)


async def test_where_only_one_working_directory_will_do_nothing_runs_elsewhere(host: Link) -> None:
    process = await run(host, "pwd", cwd="no/such/folder", cwd_required=True)
    assert (process.code, process.stdout) == (126, b"")
    assert b"no/such/folder: No such folder" in process.stderr


async def test_a_working_directory_that_does_not_exist_is_the_home(host: Link) -> None:
    process = await run(host, "pwd", cwd="/no/such/folder")
    assert process.stdout.decode().strip() == pwd.getpwuid(os.geteuid()).pw_dir


# --- terminals -------------------------------------------------------------------------------------


async def test_a_terminal_is_the_controlling_one_with_size_and_echo(host: Link) -> None:
    process = await start(host, "sh", "-c", "tty; stty size; cat", tty=WindowSize(33, 111))
    await process.until(b"33 111\r\n")
    assert process.stdout.startswith(b"/dev/pts/")
    await process.send(Stdin(b"hello\n"))
    await process.until(b"hello\r\nhello\r\n")  # the echo, then cat
    await process.send(Stdin(b"\x04"))
    assert (await process.end()).code == 0


async def test_end_of_input_at_a_terminal(host: Link) -> None:
    process = await start(host, "cat", tty=WindowSize(24, 80))
    await process.send(StdinEof())
    assert (await process.end()).code == 0


async def test_a_resize_reaches_the_foreground_job(host: Link) -> None:
    script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done"
    process = await start(host, "sh", "-c", script, tty=WindowSize(24, 80))
    await process.until(b"ready")
    await process.send(Resize(50, 132))
    assert b"50 132" in (await process.end()).stdout


async def test_control_c_interrupts(host: Link) -> None:
    process = await start(host, "sh", "-c", "echo up; exec sleep 60", tty=WindowSize(24, 80))
    await process.until(b"up")
    await process.send(Stdin(b"\x03"))
    assert (await process.end()).code == 128 + signal.SIGINT


async def test_a_login_shell_is_what_an_empty_command_means(
    host: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start(host, tty=WindowSize(24, 80), env={"ENV": "", "HISTFILE": ""}, cwd="/")
    await process.send(Stdin(b"echo $((6 * 7))-$0-$TERM; exit 9\n"))
    ended = await process.end()
    assert ended.code == 9
    shell = os.path.basename(pwd.getpwuid(os.geteuid()).pw_shell)
    assert b"42-" in ended.stdout
    assert shell.encode() in ended.stdout


async def test_much_output_of_a_terminal_is_complete(host: Link) -> None:
    process = await run(host, "seq", "100000", tty=WindowSize(24, 80))
    assert process.stdout.split() == [str(number).encode() for number in range(1, 100001)]


# --- hanging up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tty", [None, WindowSize(24, 80)])
async def test_a_reset_hangs_up_on_the_process_and_its_children(host: Link, tty: WindowSize | None) -> None:
    process = await start(host, "sh", "-c", "sleep 60 & echo $! $$; wait", tty=tty)
    await process.until(b"\n")
    pids = [int(word) for word in process.stdout.split()]
    await process.stream.reset(ErrorCode.CANCELLED, "the user left")
    for pid in pids:
        await gone(pid)


async def test_the_end_of_the_link_hangs_up(host: Link) -> None:
    process = await start(host, "sh", "-c", "echo $$; exec sleep 60")
    await process.until(b"\n")
    await host.goodbye("the host left")
    await gone(int(process.stdout))


async def test_a_process_that_ignores_the_hangup_is_killed(
    host: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "HANG_UP_GRACE", 0.2)
    process = await start(host, "sh", "-c", "trap '' HUP; echo $$; while :; do sleep 1; done")
    await process.until(b"\n")
    await process.stream.reset(ErrorCode.CANCELLED, "the user left")
    await gone(int(process.stdout))


async def test_a_stopped_process_is_hung_up_on(host: Link) -> None:
    process = await start(host, "sh", "-c", "echo $$; kill -STOP $$")
    await process.until(b"\n")
    await process.stream.reset(ErrorCode.CANCELLED, "the user left")
    await gone(int(process.stdout))


async def test_a_host_that_talks_nonsense_is_told_so_and_the_process_ends(host: Link) -> None:
    process = await start(host, "sh", "-c", "echo $$; exec sleep 60")
    await process.until(b"\n")
    await process.send(Stdout(b"a host has no stdout"))
    with pytest.raises(trio.BrokenResourceError) as caught:
        await process.stream.receive_some()
    assert getattr(caught.value.__cause__, "code", None) is ErrorCode.PROTOCOL
    await gone(int(process.stdout))


@pytest.fixture(autouse=True)
def no_descriptors_are_left() -> Iterator[None]:
    before = len(open_descriptors())
    yield
    with suppress(OSError):
        assert len(open_descriptors()) <= before
