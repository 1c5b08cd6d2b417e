"""The guest's default user: an account that looks like the host user's, made anew at every boot.

The law: doing it twice changes nothing, and a reader of /etc/passwd sees the old file or the new one,
never a part. Everything is below ``root``, so that it can be tried on any folder by anybody.

Formats: passwd(5), group(5), shadow(5).
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

USER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]{0,31}")
"""What useradd(8) takes, and what directory services make of it."""
MAX_UID = 2**32 - 2
"""4294967295 is (uid_t)-1, which chown(2) takes for 'leave it'."""

EXTRA_GROUPS = ("docker", "sudo")
"""Joined where they exist."""

SHELL = "/bin/bash"
HOME_MODE = 0o700


@dataclass(frozen=True, slots=True)
class Identity:
    """A user's name, ids and home."""

    name: str
    uid: int
    gid: int
    home: str


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace ``path``, keeping its mode and owner if it exists; a crash leaves the old one."""
    staged = path.with_name(path.name + ".agentctl")
    path.parent.mkdir(parents=True, exist_ok=True)
    staged.unlink(missing_ok=True)
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        try:
            old = path.stat()
            os.fchmod(fd, old.st_mode & 0o7777)
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, old.st_uid, old.st_gid)
        except FileNotFoundError:
            os.fchmod(fd, mode)
    staged.replace(path)


class Table:
    """A colon-separated file of /etc. Lines it does not understand are kept as they are."""

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self._path = path
        self._mode = mode
        self._before = path.read_text(encoding="utf-8") if path.exists() else ""
        self.rows = [line.split(":") for line in self._before.splitlines()]

    def find(self, name: str) -> list[str] | None:
        return next((row for row in self.rows if row[0] == name), None)

    def put(self, row: list[str], id_column: int) -> None:
        """Put ``row`` in the place of its namesake, or ahead of whoever has its id: the first one gives
        an id its name."""
        taken = (
            i
            for i, other in enumerate(self.rows)
            if other[0] == row[0] or other[id_column : id_column + 1] == [row[id_column]]
        )
        place = next(taken, len(self.rows))
        self.rows = [
            *self.rows[:place],
            row,
            *(other for other in self.rows[place:] if other[0] != row[0]),
        ]

    def save(self) -> None:
        """Write the file if it changed."""
        text = "".join(":".join(row) + "\n" for row in self.rows)
        if text != self._before:
            write_atomically(self._path, text, self._mode)


def check(name: str, uid: int) -> None:
    """Raises ``ValueError`` for a name or id that no account can have."""
    if not USER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a user")
    if not 0 <= uid <= MAX_UID:
        raise ValueError(f"{uid} cannot be the id of a user")


def ensure_user(root: Path, name: str, uid: int) -> Identity:
    """Make sure that the user exists, with home, groups and skeleton.

    Uid 0 is root itself, under whatever name the host calls it, with another home. Raises
    ``ValueError`` for a name or id that cannot be, ``OSError`` if /etc cannot be written.
    """
    check(name, uid)
    name = "root" if uid == 0 else name
    home = f"/home/{name}.guest"
    gid = _ensure_groups(root, name, uid)
    _ensure_passwd(root, name, uid, gid, home)
    identity = Identity(name, uid, gid, home)
    ensure_home(root, identity)
    return identity


def _ensure_groups(root: Path, name: str, uid: int) -> int:
    """The user's own group, and membership of the extra ones; returns the own group's id."""
    table = Table(root / "etc/group")
    own = table.find(name)
    if own is None and all(row[2:3] != [str(uid)] for row in table.rows):
        own = [name, "x", str(uid), ""]
        table.rows.append(own)
    for extra in EXTRA_GROUPS if uid else ():
        row = table.find(extra)
        if row is not None and len(row) == 4 and name not in (members := row[3].split(",")):
            row[3] = ",".join(filter(None, [*members, name]))
    table.save()
    return int(own[2]) if own is not None else uid


def _ensure_passwd(root: Path, name: str, uid: int, gid: int, home: str) -> None:
    # Shadow first: an account without an entry there is one that PAM calls expired.
    shadow = Table(root / "etc/shadow", mode=0o640)
    if shadow.find(name) is None:
        shadow.rows.append([name, "*", "20000", "0", "99999", "7", "", "", ""])
    shadow.save()
    passwd = Table(root / "etc/passwd")
    entry = passwd.find(name)
    shell = entry[6] if entry is not None and uid == 0 else SHELL
    passwd.put([name, "x", str(uid), str(gid), "", home, shell], id_column=2)
    passwd.save()


def ensure_home(root: Path, identity: Identity) -> None:
    """Make the home from /etc/skel; one that exists (homes are durable) keeps its content."""
    home = root / identity.home.removeprefix("/")
    if home.exists():
        return
    # Built beside and renamed, so that a crash cannot leave a home without half of its skeleton.
    staged = home.with_name(home.name + ".agentctl")
    shutil.rmtree(staged, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    skeleton = root / "etc/skel"
    if skeleton.is_dir():
        shutil.copytree(skeleton, staged, symlinks=True)
    else:
        staged.mkdir()
    staged.chmod(HOME_MODE)
    for path in (staged, *staged.rglob("*")):
        if os.geteuid() == 0:
            os.chown(path, identity.uid, identity.gid, follow_symlinks=False)
    staged.rename(home)
