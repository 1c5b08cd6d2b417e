"""Where the mount is not like the filesystem below it, row by row of the table, with the reason.

The outcome must be exactly this one; a row that has come to agree with the filesystem below is to be removed.
"""

from __future__ import annotations

from typing import Any

OWNERS = "What the guest makes belongs to the host's user who runs agentctl, whoever made it in the guest."
NAMESPACES = (
    "Only user.* reaches the host: other namespaces mean something to the host's kernel. Of ACLs and labels it is said that "
    "there are none of them here, as by any filesystem without them: programs then do not ask for each file's."
)
KERNEL = "Linux's FUSE knows neither collapsing nor inserting."
DEVICES = "A device of the guest's must never be one on the host."

SETUID = (
    "FUSE's FALLOCATE does not say whether the caller may keep setuid. The host's kernel takes it away, as it does "
    "for every user but root, who runs this test's file server."
)

ORDINARY = (
    "On the host it is not root who does it: nobody else's files are made, and setuid is lost by a write."
)

BY_AN_ORDINARY_USER = ("as its owner, ", "as another user, ", "chown", "create with mode: ")
"""Rows, by how they begin, that may differ where the host's side does not run as root (ORDINARY)."""

ACCEPTED: dict[str, tuple[Any, str]] = {
    "chown by an ordinary user": (["EPERM", "EPERM", "EPERM", "EPERM"], OWNERS),
    "a file belongs to who makes it": ([False, False, False], OWNERS),
    "as another user, a directory of mode: 1007": (
        [["below", "file"], "content", "ENOENT", None, "EPERM", "ENOENT", "EPERM", "ENOENT", "EPERM", None],
        OWNERS,
    ),
    "as another user, a directory of mode: 1003": (
        ["EACCES", "content", "ENOENT", None, "EPERM", "ENOENT", "EPERM", "ENOENT", "EPERM", None],
        OWNERS,
    ),
    "xattr of namespace: trusted.x": (["ENODATA", "ENOTSUP"], NAMESPACES),
    "xattr of namespace: security.x": (["ENOTSUP", "ENOTSUP"], NAMESPACES),
    "xattr of namespace: system.posix_acl_access": (["ENOTSUP", "ENOTSUP"], NAMESPACES),
    "fallocate: collapse": (["ENOTSUP", 20000, 20000, -1, "42e8bc96b8eec8c4"], KERNEL),
    "fallocate: insert": (["ENOTSUP", 20000, 20000, -1, "42e8bc96b8eec8c4"], KERNEL),
    "a write by another user drops setuid": (
        [[None, "0o100777"], [None, "0o100777"], [None, "0o106777"]],
        SETUID,
    ),
    "devices are not made": (["EPERM", False], DEVICES),
    "the whiteout of overlayfs": (["EPERM", False], DEVICES),
}
