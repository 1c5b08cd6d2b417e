"""The line to an attached machine breaks: what is asked waits, or fails after a stated time, and then all is as before."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence

import pytest

from tests.e2e.harness import eventually, fetch
from tests.free_ports import free_port
from tests.remote.machine import PYTHON, USER
from tests.remote.programs import ECHO, WEB
from tests.remote.site import Site, site


@pytest.fixture(scope="module")
def attached() -> Iterator[Site]:
    with site(USER) as made:
        (made.share / "greeting").write_text("hello\n")
        made.user.attach(*made.mount_option)
        yield made
        made.user.detach()
        eventually(lambda: not made.machine.agents())
        assert made.machine.fuse_mounts() == []


def everything_works(attached: Site) -> None:
    """Without anybody having mounted or attached anything again."""
    attached.user.wait_connected()
    eventually(lambda: attached.sh("cat share/greeting", status=None) == "hello\n")
    (attached.share / "from-here").write_text("from here")
    eventually(lambda: attached.sh("cat share/from-here", status=None) == "from here")
    attached.sh("echo from there >share/from-there")
    assert (attached.share / "from-there").read_text() == "from there\n"
    attached.sh("rm share/from-here share/from-there")
    assert eventually(lambda: attached.user.exec("echo here", check=False).stdout == b"here\n")


def test_a_second_of_silence_is_a_pause(attached: Site) -> None:
    """Nothing is lost, and nobody has to begin anew: not even connections that are carried."""
    sessions = attached.user.status()["agent_sessions"]
    port = free_port()
    with attached.machine.start([PYTHON, "-c", ECHO, str(port)], USER):
        eventually(lambda: _connects(port))
        with socket.create_connection(("127.0.0.1", port), timeout=60) as peer:
            attached.line.cut()
            peer.sendall(b"over a pause")
            timer = threading.Timer(1.0, attached.line.restore)
            timer.start()
            # What is written goes over the line, whatever was promised before.
            attached.sh("echo written >share/written")
            assert (attached.share / "written").read_text() == "written\n"
            assert peer.recv(100) == b"over a pause"
            timer.join()
    everything_works(attached)
    assert attached.user.status()["agent_sessions"] == sessions


def _connects(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
            peer.sendall(b"?")
            return peer.recv(1) == b"?"
    except OSError:
        return False


def test_a_reset_is_waited_out(attached: Site, long: bool) -> None:
    """What is open stays open; who reads in that moment waits."""
    port = free_port()
    (attached.share / "held").write_text("held\n")
    with (
        attached.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(port)], USER),
        attached.machine.start(
            ["sh", "-c", "exec 3<share/held; until [ -e go-on ]; do sleep 0.1; done; cat <&3 >was-held"], USER
        ),
    ):
        assert eventually(lambda: fetch(port)) == b"the page"
        for number in range(3 if long else 1):
            attached.line.reset()
            attached.sh(f"echo {number} >share/written{number}")
            assert (attached.share / f"written{number}").read_text() == f"{number}\n"
        assert eventually(lambda: fetch(port)) == b"the page"
        attached.sh("touch go-on")
        eventually(lambda: attached.sh("cat was-held", status=None) == "held\n")
    everything_works(attached)


def test_who_connects_meanwhile_waits_for_the_line(attached: Site) -> None:
    port = free_port()
    with attached.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(port)], USER):
        assert eventually(lambda: fetch(port)) == b"the page"
        attached.line.refuse()
        attached.user.wait_connected(False)
        timer = threading.Timer(2.0, attached.line.restore)
        timer.start()
        assert fetch(port) == b"the page"
        timer.join()
    everything_works(attached)


def test_what_changed_meanwhile_is_seen_at_once(attached: Site) -> None:
    """Promises are void when the line was gone: nobody could take them back."""
    (attached.share / "promised").write_text("old\n")
    eventually(lambda: attached.sh("cat share/promised") == "old\n")
    attached.line.refuse()
    attached.user.wait_connected(False)
    (attached.share / "promised").write_text("new\n")
    (attached.share / "born").write_text("")
    attached.line.restore()
    attached.user.wait_connected()
    eventually(lambda: attached.sh("cat share/promised", status=None) == "new\n")
    eventually(lambda: "born" in attached.sh("ls share", status=None).split())


@pytest.mark.long
@pytest.mark.parametrize("seconds", [30, 300])
def test_silence_that_nobody_announces(attached: Site, seconds: float) -> None:
    """A cable that was pulled: both sides find out by themselves."""
    gone = threading.Event()
    attached.line.cut()
    gone.wait(seconds)
    attached.line.restore()
    everything_works(attached)


def sleep(pids: Sequence[int], seconds: float) -> None:
    """What a laptop's sleep is to its processes."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        threading.Event().wait(seconds)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=pytest.mark.long), pytest.param(300, marks=pytest.mark.long)]
)
def test_a_laptop_that_sleeps_and_whose_connections_are_forgotten_meanwhile(
    attached: Site, seconds: float
) -> None:
    """The machine knows it as soon as it sleeps, this side not before it asks; nobody tells it."""
    with attached.user.config.open("a") as config:
        config.write("    ServerAliveInterval 2\n")  # without which it asks each 15 s
    attached.line.reset()
    everything_works(attached)
    (attached.share / "promised").write_text("before\n")
    port = free_port()
    with attached.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(port)], USER):
        assert eventually(lambda: fetch(port)) == b"the page"
        eventually(lambda: attached.sh("cat share/promised") == "before\n")
        host_side = attached.user.processes()
        attached.line.forget()
        (attached.share / "promised").write_text("asleep\n")
        sleep(host_side, seconds)
        everything_works(attached)
        eventually(lambda: attached.sh("cat share/promised", status=None) == "asleep\n")
        assert eventually(lambda: fetch(port)) == b"the page"
    assert set(attached.user.processes()) == set(host_side)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [60, 300])
def test_a_laptop_that_sleeps_on_a_network_that_waits_for_it(attached: Site, seconds: float) -> None:
    sleep(attached.user.processes(), seconds)
    everything_works(attached)


def with_less_patience(attached: Site) -> None:
    """Calls over there wait for 3 s instead of 30."""
    module = ".cache/agentctl/agent-*/guest_agent/fuse/host.py"
    attached.sh(f"sed -i 's/^PATIENCE: Final = 30.0/PATIENCE: Final = 3.0/' {module}")
    attached.machine.kill(attached.agent("files"))
    everything_works(attached)


def test_longer_than_patience_is_an_error_with_a_name_until_it_is_back(attached: Site) -> None:
    with_less_patience(attached)
    port = free_port()
    with attached.machine.start([PYTHON, "-c", WEB, "127.0.0.1", str(port)], USER):
        assert eventually(lambda: fetch(port)) == b"the page"
        attached.line.refuse()
        attached.user.wait_connected(False)
        # The second fails at once.
        for _ in range(2):
            failed = attached.machine.run(["touch", "share/never-made"], USER, status=1)
            assert "Input/output error" in failed.errors
        assert attached.machine.fuse_mounts() == [attached.there]
        said = attached.user.agentctl("status", check=False).stdout.decode()
        assert "box" in said
        attached.line.restore()
        everything_works(attached)
        assert not (attached.share / "never-made").exists()
        assert eventually(lambda: fetch(port)) == b"the page"


def test_a_network_that_drops_everything_without_a_word(attached: Site) -> None:
    """No packet is answered, not even by its kernel. That a session is silent is found out within 20 s, and then calls
    wait for as long as they are patient. Who lets go of the machine meanwhile does not wait for it."""
    with_less_patience(attached)
    attached.line.vanish()
    for _ in range(2):
        failed = attached.machine.run(["touch", "share/never-made"], USER, status=1)
        assert "Input/output error" in failed.errors
    attached.user.wait_connected(False)
    attached.user.detach()
    assert attached.user.processes() == []
    assert "ends by itself, in 600 s" in attached.user.log()
    assert attached.machine.fuse_mounts() == [attached.there]
    attached.line.restore()
    attached.user.attach()
    everything_works(attached)
    assert not (attached.share / "never-made").exists()
