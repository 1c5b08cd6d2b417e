from __future__ import annotations

from pathlib import Path

import pytest

from guest_agent import accounts
from guest_agent.accounts import Identity, ensure_home, ensure_user, write_atomically

PASSWD = "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
GROUP = "root:x:0:\ndaemon:x:1:\ntty:x:5:\nsudo:x:27:\ndocker:x:990:someone\n"
SHADOW = "root:*:20000:0:99999:7:::\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accounts.os, "geteuid", lambda: 12345)  # nobody may chown here
    etc = tmp_path / "etc"
    (etc / "skel/.config").mkdir(parents=True)
    (etc / "skel/.bashrc").write_text("# hello\n")
    (etc / "passwd").write_text(PASSWD)
    (etc / "group").write_text(GROUP)
    (etc / "shadow").write_text(SHADOW)
    (etc / "shadow").chmod(0o640)
    return tmp_path


def contents(root: Path) -> dict[str, str]:
    return {name: (root / "etc" / name).read_text() for name in ("passwd", "group", "shadow")}


def test_a_new_user(root: Path) -> None:
    assert ensure_user(root, "jo", 1000) == Identity("jo", 1000, 1000, "/home/jo.guest")
    assert contents(root) == {
        "passwd": PASSWD + "jo:x:1000:1000::/home/jo.guest:/bin/bash\n",
        "group": GROUP.replace("sudo:x:27:", "sudo:x:27:jo").replace("someone", "someone,jo")
        + "jo:x:1000:\n",
        "shadow": SHADOW + "jo:*:20000:0:99999:7:::\n",
    }
    home = root / "home/jo.guest"
    assert home.stat().st_mode & 0o7777 == 0o700
    assert (home / ".bashrc").read_text() == "# hello\n"
    assert (root / "etc/shadow").stat().st_mode & 0o7777 == 0o640


def test_twice_changes_nothing(root: Path) -> None:
    ensure_user(root, "jo", 1000)
    before, inode = contents(root), (root / "etc/passwd").stat().st_ino
    assert ensure_user(root, "jo", 1000).gid == 1000
    assert contents(root) == before
    assert (root / "etc/passwd").stat().st_ino == inode


def test_root_keeps_its_name_and_shell_and_gets_a_home(root: Path) -> None:
    assert ensure_user(root, "whoever", 0) == Identity("root", 0, 0, "/home/root.guest")
    first, *rest = (root / "etc/passwd").read_text().splitlines()
    assert first == "root:x:0:0::/home/root.guest:/bin/bash"
    assert rest == PASSWD.splitlines()[1:]
    assert (root / "etc/group").read_text() == GROUP


def test_a_name_of_the_guests_own_gets_the_hosts_id(root: Path) -> None:
    assert ensure_user(root, "daemon", 501) == Identity("daemon", 501, 1, "/home/daemon.guest")
    assert "daemon:x:501:1::/home/daemon.guest:/bin/bash" in (root / "etc/passwd").read_text()
    assert (root / "etc/passwd").read_text().count("daemon:x:") == 1


def test_an_id_of_the_guests_own_gets_the_hosts_name(root: Path) -> None:
    assert ensure_user(root, "jo", 1).gid == 1  # the group of that id stays, under its name
    lines = (root / "etc/passwd").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["root", "jo", "daemon"]


def test_an_existing_home_keeps_its_content(root: Path) -> None:
    home = root / "home/jo.guest"
    home.mkdir(parents=True)
    (home / "mine").write_text("kept")
    ensure_user(root, "jo", 1000)
    assert [path.name for path in home.iterdir()] == ["mine"]


def test_a_crash_while_a_home_was_made_leaves_a_whole_one_afterwards(root: Path) -> None:
    (root / "home/jo.guest.agentctl").mkdir(parents=True)
    ensure_home(root, Identity("jo", 1000, 1000, "/home/jo.guest"))
    assert (root / "home/jo.guest/.bashrc").exists()
    assert [path.name for path in (root / "home").iterdir()] == ["jo.guest"]


@pytest.mark.parametrize(
    ("name", "uid"),
    [("", 1), ("a:b", 1), ("a\nb", 1), ("../x", 1), ("-x", 1), ("x" * 33, 1), ("jo", -1), ("jo", 2**32 - 1)],
)
def test_impossible_users_change_nothing(root: Path, name: str, uid: int) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        ensure_user(root, name, uid)
    assert contents(root) == {"passwd": PASSWD, "group": GROUP, "shadow": SHADOW}


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new/file"
    write_atomically(path, "one", 0o600)
    assert path.stat().st_mode & 0o7777 == 0o600
    path.chmod(0o644)
    with path.open() as old:
        write_atomically(path, "two", 0o600)
        assert old.read() == "one"
    assert (path.read_text(), path.stat().st_mode & 0o7777) == ("two", 0o644)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
