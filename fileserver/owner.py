"""Whose the files are to the guest, where its user has other ids than ours.

A VM's user has the ids of the host's. A machine that was there before has users of its own: there, what is ours is
shown as its user's (else git(1) takes a repository for somebody else's), and what is not ours as nobody's. Without
that, whoever has our number there would be let in by that machine's kernel as if he were us.

The law: what is shown as a user's can be given to that user, and is then ours; nobody else can be given anything.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import Final

from fileserver.linux import failure

NOBODY: Final = 65534
"""The kernel's own overflow id (/proc/sys/fs/overflowuid)."""

ROOT: Final = 0


@dataclass(frozen=True, slots=True)
class Owner:
    """The ids in the guest that stand for ``own``, which are ours: user, group."""

    uid: int
    gid: int
    own: tuple[int, int] = field(default_factory=lambda: (os.geteuid(), os.getegid()))

    def shown(self, uid: int, gid: int) -> tuple[int, int]:
        """As the guest sees what has these ids here."""
        own_uid, own_gid = self.own
        return self.uid if uid == own_uid else NOBODY, self.gid if gid == own_gid else NOBODY

    def meant(self, uid: int, gid: int) -> tuple[int, int]:
        """The ids here that the guest means; -1 is left alone. Raises EPERM for those of anybody else.

        Root there may act for its user: dockerd gives each folder that it makes for a bind mount to itself.
        """
        own_uid, own_gid = self.own
        if uid not in (-1, ROOT, self.uid) or gid not in (-1, ROOT, self.gid):
            raise failure(errno.EPERM)
        return -1 if uid == -1 else own_uid, -1 if gid == -1 else own_gid
