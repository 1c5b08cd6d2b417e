"""A machine that is attached feels like this one: as root over there, and as an ordinary user."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from tests import copies
from tests.e2e.harness import eventually, fetch, is_refused
from tests.free_ports import free_port
from tests.remote.machine import PYTHON, USER
from tests.remote.programs import ECHO_DATAGRAMS, WEB
from tests.remote.site import Site, site


@pytest.fixture(scope="module", params=["root", USER])
def attached(request: pytest.FixtureRequest) -> Iterator[Site]:
    with site(request.param) as made:
        (made.share / "greeting").write_text("hello\n")
        made.user.attach(*made.mount_option)
        yield made
        made.user.detach()
        eventually(lambda: not made.machine.agents())
        assert made.machine.fuse_mounts() == []
        assert made.user.processes() == []


@pytest.fixture
def much(attached: Site, long: bool) -> Site:
    """For what moves much, which is the same for every account."""
    if attached.account != USER and not long:
        pytest.skip("a full-length campaign; run with --long")
    return attached


# --- what is said of it ----------------------------------------------------------------------------------


def test_it_is_listed_and_running(attached: Site) -> None:
    rows = json.loads(attached.user.agentctl("list", "--json").stdout)
    assert [row["name"] for row in rows] == ["box"]
    status = attached.user.status()
    assert status["stage"] == "running", status
    assert status["guest_connected"]
    shown = attached.user.agentctl("status").stdout.decode()
    assert all(word in shown for word in ("running", "connected", attached.account, "mounts"))


def test_what_reads_an_instance_reads_this_one(attached: Site) -> None:
    assert str(attached.share) in attached.user.agentctl("mounts").stdout.decode()
    attached.user.agentctl("ports")
    load = json.loads(attached.user.agentctl("top", "--once", "--json").stdout)
    assert load["guest"], load
    assert attached.there in json.dumps(load["mounts"])


def test_without_docker_there_is_nothing_of_dockers(attached: Site) -> None:
    assert not (attached.user.directory / "docker.sock").exists()
    assert not [*attached.user.docker_config.glob("contexts/meta/*/meta.json")]


# --- ports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_is_there_and_gone_with_its_program(attached: Site, address: str) -> None:
    port = free_port()
    with attached.machine.start([PYTHON, "-c", WEB, address, str(port)], attached.account):
        assert eventually(lambda: fetch(port)) == b"the page"
    eventually(lambda: is_refused(port))


def test_two_hundred_connections_one_after_another(much: Site) -> None:
    port = free_port()
    with much.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(port)], much.account):
        eventually(lambda: fetch(port))
        assert [fetch(port) for _ in range(200)] == [b"the page"] * 200


def test_datagrams(attached: Site) -> None:
    port = free_port()
    with (
        attached.machine.start([PYTHON, "-c", ECHO_DATAGRAMS, str(port)], attached.account),
        socket.socket(type=socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(0.5)

        def answered() -> bool:
            try:
                client.sendto(b"one", ("127.0.0.1", port))
                return client.recv(100) == b"one"
            except OSError:
                return False

        eventually(answered)


def test_a_rule_moves_a_port(attached: Site) -> None:
    there, here = free_port(), free_port()
    attached.user.agentctl("forward", "add", f"{here}:{there}")
    with attached.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(there)], attached.account):
        assert eventually(lambda: fetch(here)) == b"the page"
        assert is_refused(there)


# --- files -----------------------------------------------------------------------------------------------


def test_what_is_written_here_is_read_there(attached: Site) -> None:
    assert attached.sh("cat share/greeting") == "hello\n"
    (attached.share / "greeting").write_text("hello again\n")
    eventually(lambda: attached.sh("cat share/greeting") == "hello again\n")
    (attached.share / "new").write_text("new\n")
    eventually(lambda: "new" in attached.sh("ls share").split())
    (attached.share / "new").unlink()
    eventually(lambda: "new" not in attached.sh("ls share").split())


def test_what_is_written_there_is_read_here(attached: Site) -> None:
    attached.sh(
        "mkdir -p share/made/deep && echo there >share/made/deep/file && ln -s deep/file share/made/link"
    )
    assert (attached.share / "made/deep/file").read_text() == "there\n"
    assert os.readlink(attached.share / "made/link") == "deep/file"
    assert attached.sh("stat -c %U share/made") == f"{attached.account}\n"
    attached.sh("mv share/made share/moved && chmod 750 share/moved/deep && rm share/moved/deep/file")
    assert (attached.share / "moved/deep").stat().st_mode & 0o777 == 0o750
    assert not (attached.share / "moved/deep/file").exists()


def test_a_program_that_builds(attached: Site) -> None:
    """Many small files, renames, links, modes and an index of it all."""
    attached.sh(
        "mkdir share/work && cd share/work && git init -q . && for i in $(seq 100); do echo $i >file$i; done"
        " && git add . && git -c user.name=a -c user.email=b commit -qm all && git status --porcelain && git fsck"
    )
    names = {path.name for path in (attached.share / "work").glob("file*")}
    assert names == {f"file{i}" for i in range(1, 101)}


def test_a_large_file_on_the_mount(much: Site) -> None:
    (much.share / "noise").write_bytes(os.urandom(20_000_000))
    much.sh("cp share/noise share/copy && cmp share/noise share/copy")
    assert (much.share / "copy").read_bytes() == (much.share / "noise").read_bytes()


# --- programs --------------------------------------------------------------------------------------------


def test_exit_status_and_separate_streams(attached: Site) -> None:
    done = attached.user.exec("echo out; echo err >&2; exit 7", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert attached.user.agentctl("exec", "no-such-command", check=False).returncode == 127


def test_who_and_where_a_program_is(attached: Site) -> None:
    done = attached.user.exec("id -un; pwd; echo $HOME")
    assert done.stdout.decode().split() == [
        attached.account,
        f"/mnt/{attached.account}",
        f"/mnt/{attached.account}",
    ]


def test_stdin_goes_through_whole_and_ends(attached: Site) -> None:
    noise = os.urandom(3_000_000)
    assert attached.user.agentctl("exec", "cat", input=noise).stdout == noise


def test_a_signal_reaches_the_process(attached: Site) -> None:
    script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.2; done"
    with attached.user.popen(
        "exec", "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"caught\n"
    assert process.returncode == 5


def test_a_killed_client_takes_its_process_along(attached: Site) -> None:
    def is_there() -> bool:
        return any(line == "sleep 8765" for line in attached.machine.processes().values())

    with attached.user.popen("exec", "sleep", "8765", stdin=subprocess.DEVNULL) as process:
        eventually(is_there)
        process.kill()
    eventually(lambda: not is_there())


def _until(descriptor: int, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        ready, _, _ = select.select([descriptor], [], [], 60)
        assert ready, seen
        seen += os.read(descriptor, 4096)
    return seen


def test_a_shell_has_a_terminal_of_our_size_that_follows_ours(attached: Site) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "host_agent", "shell"], attached.user.environment)
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
        # Split in the middle, so that the echo of what we type is not mistaken for the answer.
        os.write(terminal, b"stty size; echo do''ne\n")
        assert b"33 99" in _until(terminal, b"done\r\n")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 111, 0, 0))
        os.write(terminal, b"until stty size | grep '44 111'; do sleep 0.1; done; echo si''zed\n")
        _until(terminal, b"sized\r\n")
        os.write(terminal, b"exit 9\n")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 9
    finally:
        os.close(terminal)


def test_a_large_file_goes_over_and_goes_on_where_it_was_interrupted(much: Site) -> None:
    source, there = much.directory / "over", f"/mnt/{much.account}/over"
    source.mkdir(exist_ok=True)
    much.sh("rm -rf over && mkdir over")
    copies.goes_on_when_it_is_called_again(
        much.user, source, there, lambda: int(much.sh(copies.PART_SIZE % "over"))
    )
    assert much.sh("ls -A over") == "noise\n"
    digest = hashlib.sha256((source / "noise").read_bytes()).hexdigest()
    assert much.sh("sha256sum over/noise").split()[0] == digest


def test_a_large_file_comes_over_and_goes_on_by_itself(much: Site) -> None:
    back = much.directory / "back"
    shutil.rmtree(back, ignore_errors=True)
    back.mkdir()
    much.sh(f"head -c {copies.SIZE} /dev/urandom >large")
    copies.goes_on_by_itself(much.user, back, f"/mnt/{much.account}/large", much.line.reset)
    digest = hashlib.sha256((back / "large").read_bytes()).hexdigest()
    assert much.sh("sha256sum large").split()[0] == digest


# --- ends of parts ---------------------------------------------------------------------------------------


def test_a_killed_host_agent_comes_back_and_mounts_stay(attached: Site) -> None:
    with attached.machine.start(
        ["sh", "-c", "exec 3<share/greeting; sleep 1000"], attached.account
    ) as holder:
        before = attached.user.status()["agent_pid"]
        os.kill(before, signal.SIGKILL)
        # Waits meanwhile, on the same mount.
        assert attached.sh("ls -a share/greeting") == "share/greeting\n"

        def is_back() -> bool:
            status = attached.user.status()
            return status["agent_pid"] not in (0, before) and bool(status["guest_connected"])

        eventually(is_back)
        assert holder.process.poll() is None
    (attached.share / "after").write_text("after\n")
    eventually(lambda: attached.sh("cat share/after", status=None) == "after\n")
    port = free_port()
    with attached.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(port)], attached.account):
        assert eventually(lambda: fetch(port)) == b"the page"


@pytest.mark.parametrize("plane", ["control", "files"])
def test_a_killed_agent_over_there_comes_back(attached: Site, plane: str) -> None:
    killed = attached.agent(plane)
    attached.machine.kill(killed)
    eventually(lambda: attached.agents(plane) not in ([], [killed]))
    eventually(lambda: attached.sh("cat share/greeting", status=None).startswith("hello"))
    assert eventually(lambda: attached.user.exec("echo here", check=False).stdout == b"here\n")
    port = free_port()
    with attached.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(port)], attached.account):
        assert eventually(lambda: fetch(port)) == b"the page"
