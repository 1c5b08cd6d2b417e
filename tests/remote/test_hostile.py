"""Machines that are not as they should be: one sentence each and nothing left over there, or it works all the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.harness import eventually
from tests.remote.machine import PYTHON, USER
from tests.remote.site import Site, site
from tests.remote.sshd import make_key


@pytest.fixture(scope="module")
def visited() -> Iterator[Site]:
    """A machine that nothing is wrong with; each test makes it strange and puts that right again."""
    with site(USER) as made:
        yield made


@pytest.fixture
def strange(visited: Site) -> Iterator[Site]:
    """Nothing is attached before and after."""
    yield visited
    visited.sh("cp .ssh/authorized_keys.good .ssh/authorized_keys")
    visited.user.agentctl("delete", "--data", "--yes", check=False, timeout=60)
    visited.user.know(visited.keys, visited.line.port)
    # What nobody could end because nobody was let in would go on for ten minutes.
    for pid in visited.machine.agents():
        visited.machine.kill(pid)
    visited.sh("rm -rf .bashrc .profile .bash_profile .cache bin")
    assert visited.machine.fuse_mounts() == []
    assert visited.user.processes() == []


@pytest.fixture(scope="module", autouse=True)
def _kept(visited: Site) -> None:
    visited.sh("cp .ssh/authorized_keys .ssh/authorized_keys.good")


def refused(site: Site, *arguments: str) -> str:
    """What ``attach`` says as it fails; not much, and no traceback."""
    done = site.user.attach(*arguments, check=False)
    said = done.stderr.decode()
    assert done.returncode != 0, said
    lines = [line for line in said.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 12, said
    assert all(len(line) < 600 and line.isprintable() for line in lines), said
    return said


def force(site: Site, command: str) -> None:
    """Whatever is asked of it, the account runs ``command``."""
    escaped = command.replace('"', '\\"')
    site.machine.write(
        f"/mnt/{USER}/.ssh/authorized_keys", f'command="{escaped}" {site.keys.user_public}', USER
    )


# --- keys ------------------------------------------------------------------------------------------------


def test_an_unknown_host_key_is_not_trusted(strange: Site) -> None:
    strange.user.known_hosts.write_text("")
    accepted = strange.machine.log().count("Accepted")
    said = refused(strange)
    assert "SHA256:" in said
    assert "known" in said
    assert strange.machine.log().count("Accepted") == accepted
    assert strange.user.known_hosts.read_text() == ""


def test_another_host_key_is_not_trusted(strange: Site) -> None:
    other = make_key(strange.directory / "other_host_key")
    kind, key = other.with_suffix(".pub").read_text().split()[:2]
    strange.user.known_hosts.write_text(f"[127.0.0.1]:{strange.line.port} {kind} {key}\n")
    accepted = strange.machine.log().count("Accepted")
    said = refused(strange)
    assert "shows another key than the one known for it" in said
    assert strange.machine.log().count("Accepted") == accepted


def test_a_host_key_that_changes_later_ends_it_with_a_sentence(strange: Site) -> None:
    """Who is asked again after a loss of the connection is looked at as closely as the first time."""
    strange.user.attach()
    other = strange.directory / "later_host_key"
    other.unlink(missing_ok=True)
    make_key(other)
    kind, key = other.with_suffix(".pub").read_text().split()[:2]
    strange.user.known_hosts.write_text(f"[127.0.0.1]:{strange.line.port} {kind} {key}\n")
    strange.line.reset()
    strange.user.wait_connected(False)
    eventually(lambda: "shows another key" in strange.user.agentctl("status", check=False).stdout.decode())
    assert not strange.user.status().get("guest_connected")


def test_a_key_that_is_not_let_in(strange: Site) -> None:
    strange.sh(": >.ssh/authorized_keys")
    said = refused(strange)
    assert f"lets {USER} in with none of the keys there are" in said


# --- shells ----------------------------------------------------------------------------------------------


def test_shell_startup_files_that_print(strange: Site) -> None:
    strange.machine.write(
        f"/mnt/{USER}/.bashrc",
        "echo 'Welcome to the machine!'; echo 'and on stderr' >&2; printf 'no end of line'; head -c 300000 /dev/urandom\n",
        USER,
    )
    (strange.share / "greeting").write_text("hello\n")
    strange.user.attach(*strange.mount_option)
    eventually(lambda: strange.sh("cat share/greeting", status=None) == "hello\n")
    assert strange.user.exec("echo here").stdout == b"here\n"
    strange.line.reset()
    eventually(lambda: strange.user.exec("echo here", check=False).stdout == b"here\n")
    strange.user.detach()
    assert strange.machine.agents() == {}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("head -c 3000000 /dev/urandom", marks=pytest.mark.long),
        "cat /dev/zero",
        "yes agentctl-check 0000 {}",
        "echo This account is not available.; exit 1",
        pytest.param("exec cat", marks=pytest.mark.long),
        pytest.param("kill -9 $$", marks=pytest.mark.long),
    ],
)
def test_garbage_instead_of_an_agent(strange: Site, command: str) -> None:
    force(strange, command)
    refused(strange)
    assert strange.machine.sh("ls -A .cache 2>/dev/null || true", USER) == ""


def test_an_agent_that_turns_into_garbage(strange: Site) -> None:
    """It was let in, and is attached; then whatever it is asked for is answered with noise. And then it is back."""
    strange.user.attach()
    accepted = strange.machine.log().count("Accepted")
    force(strange, "cat /dev/urandom")
    strange.line.reset()
    strange.user.wait_connected(False)
    agent = strange.user.status()["agent_pid"]
    eventually(lambda: strange.machine.log().count("Accepted") >= accepted + 2)
    strange.sh("cp .ssh/authorized_keys.good .ssh/authorized_keys")
    strange.line.reset()
    strange.user.wait_connected()
    assert strange.user.status()["agent_pid"] == agent
    assert strange.user.exec("echo here").stdout == b"here\n"


# --- what is missing -------------------------------------------------------------------------------------


def test_an_upload_that_was_damaged_is_done_again(strange: Site) -> None:
    strange.user.attach()
    strange.user.detach()
    eventually(lambda: not strange.machine.agents())
    strange.sh(
        "for f in .cache/agentctl/*.pyz; do truncate -s 1000 $f; done; rm -rf .cache/agentctl/agent-*/guest_agent"
    )
    strange.user.attach()
    assert strange.user.exec("echo here").stdout == b"here\n"


def test_a_full_disk() -> None:
    """At the upload, as it is unpacked, and no more."""
    with site(USER, homes_size=100_000) as made:
        for larger in ("900k", "100m"):
            said = refused(made)
            assert "full" in said or "space" in said, said
            assert made.machine.agents() == {}
            made.machine.sh(f"mount -o remount,size={larger} /mnt")
        made.user.attach()
        assert made.user.exec("echo here").stdout == b"here\n"
        made.user.detach()


def test_a_home_that_cannot_be_written_to(strange: Site) -> None:
    strange.machine.sh(f"chmod 500 /mnt/{USER}")
    try:
        said = refused(strange)
        assert f"/mnt/{USER}" in said, said
    finally:
        strange.machine.sh(f"chmod 700 /mnt/{USER}")


def test_no_python() -> None:
    found = subprocess.run(
        ["sh", "-c", "ls /usr/bin/python3*[0-9] /usr/local/bin/python3*[0-9]"], capture_output=True
    )
    with site(USER, hide=[PYTHON, *found.stdout.decode().split()]) as made:
        said = refused(made)
        assert "Python" in said or "python3" in said, said
