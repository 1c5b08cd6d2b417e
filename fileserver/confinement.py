"""Is a directory still in the share?

A descriptor goes on meaning its directory wherever a program of the host moves that: out of the share, too, and a guest
that still knows it could look around and create files there. So before a name in a directory is looked at, the
directory must be below the root. It is if it was just found by its name; else that is asked of the kernel: what it
says is the path of the directory's descriptor (/proc/self/fd/N, d_path()) begins with what it says of the root's own.
Neither is resolved, so no symlink and no renaming above the root matters, and what is mounted below has the path of its
mount point. A directory that was deleted counts for where it was: there is nothing in it.

Two readlink(2) are 3 us, a lookup in a directory that is held takes 8 us (measured), so the answer stays valid for
``VALID`` seconds, and costs a lookup 0.2 us. No guest gains by that time: it cannot move a directory out, only the
host does. What it has open it keeps, as a program of the host that has a file open does (``datafiles``).

On a network filesystem the path is what this host last heard of it. A directory of a bind mount that was moved out of
what is mounted has its path in the filesystem; that this begins with the share's own is left to chance.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Final

from fileserver import linux
from fileserver.nodes import Node

VALID: Final = 0.1
"""Seconds: as long as a call that had begun before may well take."""


def confirm(directory: Node) -> None:
    """It was found below the root just now: that is believed until ``Node.confirmed``."""
    directory.confirmed = time.monotonic() + VALID


def is_below(directory: Node, root: Node) -> bool:
    """Ask the kernel. Both have a descriptor, and are in use. May be False if the root is being renamed: who needs to
    know asks again (``walk.WALKS``)."""
    top = linux.path_of(root.descriptor)
    here = _path_below(directory.descriptor)
    return here == top or here.startswith(top.rstrip(b"/") + b"/")


def _path_below(descriptor: int) -> bytes:
    """Its path, or that of the first directory above it whose path the kernel can say: PATH_MAX is 4,096. It can say
    the root's, so the one that is found is not above the root unless this one is."""
    above = -1
    try:
        while True:
            try:
                return linux.path_of(descriptor if above < 0 else above)
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
            below, above = above, linux.open_entry(descriptor if above < 0 else above, b"..")
            if below >= 0:
                os.close(below)
    finally:
        if above >= 0:
            os.close(above)
