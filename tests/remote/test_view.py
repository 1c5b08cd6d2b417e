"""The files of an attached machine on this one: as root over there, and as an ordinary user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

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
            made.user.detach()
            for path in unmounting.mounted():
                if path.startswith(f"{made.directory}/"):
                    unmounting.unmount(path)
                    raise AssertionError(f"{path} was left")
        eventually(lambda: not made.machine.agents())


@pytest.fixture(scope="module")
def view(attached: Site) -> Path:
    shown = json.loads(attached.user.agentctl("view", "--json", timeout=200).stdout)
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


def test_a_killed_server_and_a_killed_host_agent(attached: Site, view: Path) -> None:
    attached.machine.kill(attached.agent("view"))

    def works() -> bool:
        return run(["cat", f"{view}/machine/etc/hostname"]).returncode == 0

    eventually(works)
    os.kill(attached.user.status()["agent_pid"], signal.SIGKILL)
    eventually(works)
    assert [path for path in unmounting.mounted() if path == str(view)] == [str(view)]


def test_it_is_ended_and_leaves_nothing(attached: Site, view: Path) -> None:
    attached.user.agentctl("view", "--end")
    assert not view.exists()
    assert str(view) not in unmounting.mounted()
    attached.user.agentctl("view", timeout=200)  # for the detaching
