"""The files of an attached machine on this one: as root over there, and as an ordinary user.

What a mount, a link and a server each do when they are lost is in ``tests/view``; here it is a line that is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from host_agent.view import library, unmounting
from tests.e2e.harness import eventually
from tests.remote.machine import USER
from tests.remote.site import Site, site

pytestmark = pytest.mark.skipif(library.find_library() is None, reason="needs libfuse 3")

BOUND = 60
"""Seconds for a program that touches the view; it is killed then, and the test has failed."""


@pytest.fixture(scope="module", params=["root", USER])
def attached(request: pytest.FixtureRequest) -> Iterator[Site]:
    with site(request.param) as made:
        (made.share / "greeting").write_text("hello\n")
        made.user.attach(*made.mount_option)
        try:
            yield made
        finally:
            made.user.detach()  # with a view that is looked at
            left = [path for path in unmounting.mounted() if path.startswith(f"{made.directory}/")]
            for path in left:
                unmounting.unmount(path)
        assert left == []
        assert list(made.user.directory.glob("view*/*")) == []
        eventually(lambda: not made.machine.agents())


def state(attached: Site) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(attached.user.agentctl("view", "--json", timeout=200).stdout)
    return shown


@pytest.fixture(scope="module")
def view(attached: Site) -> Path:
    shown = state(attached)
    assert shown["stage"] == "mounted", shown
    return Path(shown["path"])


def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=BOUND, check=False)


def home(attached: Site, view: Path) -> str:
    return f"{view}/home/{attached.account}"


def test_the_home_is_read_write_and_the_machine_is_not(attached: Site, view: Path) -> None:
    attached.sh("echo there >~/file; ln -sf /etc/hostname ~/link")
    assert run(["cat", f"{home(attached, view)}/file"]).stdout == "there\n"
    assert run(["sh", "-c", f"echo here >{home(attached, view)}/file"]).returncode == 0
    assert attached.sh("cat ~/file") == "here\n"
    assert attached.sh("stat -c %U ~/file") == f"{attached.account}\n"
    assert run(["cat", f"{view}/machine/etc/hostname"]).stdout == attached.sh("cat /etc/hostname")
    assert run(["readlink", f"{home(attached, view)}/link"]).stdout == "../../machine/etc/hostname\n"
    assert run(["cat", f"{home(attached, view)}/link"]).stdout == attached.sh("cat /etc/hostname")
    assert "Read-only" in run(["touch", f"{view}/machine/tmp/x"]).stderr
    rows = attached.user.agentctl("view").stdout.decode().splitlines()
    assert rows[0] == str(view)
    assert ["machine", "read-only"] in [row.split() for row in rows]


def test_what_that_user_may_not_read_is_not_read(attached: Site, view: Path) -> None:
    attached.machine.sh("mkdir -p /mnt/closed && chmod 700 /mnt/closed && echo x >/mnt/closed/x")
    done = run(["cat", f"{view}/machine/mnt/closed/x"])
    assert (done.stdout == "x\n") is (attached.account == "root"), done


def test_our_own_folders_over_there_are_shown_empty(attached: Site, view: Path) -> None:
    """They are here already, and may have the view in them."""
    assert attached.sh("cat share/greeting") == "hello\n"
    shown = run(["ls", "-A", f"{view}/machine{attached.there}"])
    assert shown.stdout == "", shown


def view_process(view: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[1:4] == [b"-m", b"host_agent.view", os.fsencode(view)]:
                return int(entry.name)
    raise AssertionError("there is none")


def test_a_killed_server_and_a_killed_view_and_a_killed_host_agent(attached: Site, view: Path) -> None:
    attached.machine.kill(attached.agent("view"))

    def works() -> bool:
        return run(["cat", f"{view}/machine/etc/hostname"]).returncode == 0

    eventually(works)
    for kill in (view_process(view), attached.user.status()["agent_pid"]):
        os.kill(kill, signal.SIGKILL)
        eventually(works)
    assert [path for path in unmounting.mounted() if path == str(view)] == [str(view)]


def test_what_can_be_packed_and_what_cannot(attached: Site, view: Path) -> None:
    """Both ways: the connection packs what travels if that is worth it."""
    attached.sh("seq 1000000 >~/text; head -c 5000000 /dev/urandom >~/noise")
    for name in ("text", "noise"):
        assert (
            run(["cp", f"{home(attached, view)}/{name}", f"{home(attached, view)}/{name}.copy"]).stderr == ""
        )
        attached.sh(f"cmp ~/{name} ~/{name}.copy; rm ~/{name} ~/{name}.copy")


def test_a_lost_line_is_told_and_waited_out(attached: Site, view: Path) -> None:
    """What is asked fails, and says why; what the kernel has to ask nobody for goes on, and all comes back by itself."""
    attached.sh("echo before >~/kept")
    attached.line.refuse()
    try:
        eventually(lambda: not state(attached)["connected"])
        assert state(attached)["reason"]
        for argv in (
            ["cat", f"{view}/machine/etc/passwd"],
            ["ls", f"{home(attached, view)}"],
            ["sh", "-c", f"echo lost >{home(attached, view)}/kept"],
        ):
            assert "Host is down" in run(argv).stderr
        assert run(["ls", str(view)]).stdout.split() == ["home", "machine"]
    finally:
        attached.line.restore()
    attached.user.wait_connected()
    eventually(lambda: run(["cat", f"{home(attached, view)}/kept"]).stdout == "before\n")
    assert run(["sh", "-c", f"echo after >{home(attached, view)}/kept"]).stderr == ""
    assert attached.sh("cat ~/kept") == "after\n"


@pytest.mark.long
def test_a_line_that_is_silent_is_given_up(attached: Site, view: Path) -> None:
    attached.line.cut()
    try:
        said = run(["cat", f"{view}/machine/etc/passwd"]).stderr
        assert "timed out" in said or "Host is down" in said
    finally:
        attached.line.restore()
    attached.user.wait_connected()
    eventually(lambda: run(["cat", f"{view}/machine/etc/hostname"]).returncode == 0)


def test_it_is_ended_and_leaves_nothing(attached: Site, view: Path) -> None:
    """Over a line, and without one."""
    attached.user.agentctl("view", "--end")
    assert not view.exists()
    assert state(attached)["stage"] == "mounted"
    attached.line.refuse()
    try:
        attached.user.agentctl("view", "--end", timeout=BOUND)
        assert not view.exists()
        assert str(view) not in unmounting.mounted()
    finally:
        attached.line.restore()
    attached.user.wait_connected()
    assert state(attached)["stage"] == "mounted"
