"""The guest's system store of trusted certificates: the distribution's, and what the host adds.

The law: the store always has what the host said last, and all of the distribution's. It becomes what
update-ca-certificates(8) would make of it (a file for Go, curl and git; names by hash for OpenSSL's folder), without
the seconds that this takes under emulation; and if somebody runs it, it finds ours among the local ones.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from guest_agent.accounts import write_atomically
from guest_agent.blocks import with_block, without_block

LOCAL = "usr/local/share/ca-certificates"
BUNDLE = "etc/ssl/certs/ca-certificates.crt"
HASHED = "etc/ssl/certs"

PREFIX = "agentctl-"

SCRATCH = "run/agentctl/trust"

REHASH_TIME = 20.0
"""Seconds for all of them; one takes 10 ms natively."""

MAX_COUNT = 512

_BODY = re.compile(r"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")


def rehash(folder: Path) -> None:
    """Make the links HASH.N of the certificates in ``folder``. Raises ``OSError``, ``subprocess.SubprocessError``."""
    subprocess.run(["openssl", "rehash", str(folder)], check=True, capture_output=True, timeout=REHASH_TIME)


def trust(root: Path, certificates: Sequence[bytes], rehash: Callable[[Path], None] = rehash) -> None:
    """Trust ``certificates`` (DER) below ``root``, and none that were given before and are not among them.

    Raises ``OSError``; ``ValueError`` for too many, with nothing done; ``subprocess.SubprocessError`` with the file
    written and OpenSSL's folder not, which is tried again the next time.
    """
    if len(certificates) > MAX_COUNT:
        raise ValueError(f"{len(certificates)} certificates; {MAX_COUNT} are possible")
    bundle = root / BUNDLE
    before = bundle.read_text(encoding="utf-8", errors="replace") if bundle.exists() else ""
    known = (
        {_squeezed(match[1]) for match in _BODY.finditer(without_block(before))} if certificates else set()
    )
    added = [
        _pem(body)
        for certificate in dict.fromkeys(certificates)
        if (body := base64.b64encode(certificate).decode()) not in known
    ]
    if (after := with_block(before, added)) != before:
        write_atomically(bundle, after)
    wanted = {f"{PREFIX}{number}.crt": f"{pem}\n" for number, pem in enumerate(added)}
    if wanted != _local(root / LOCAL):
        _replace_links(root, wanted, rehash)
        _replace_local(root / LOCAL, wanted)  # last: what is there has its links


def _squeezed(body: str) -> str:
    return "".join(body.split())


def _pem(body: str) -> str:
    """RFC 7468: lines of 64 characters."""
    lines = [body[start : start + 64] for start in range(0, len(body), 64)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----"])


def _local(folder: Path) -> dict[str, str]:
    """Those of ours that are there, by name."""
    return {path.name: path.read_text(errors="replace") for path in folder.glob(f"{PREFIX}*.crt")}


def _replace_local(folder: Path, wanted: Mapping[str, str]) -> None:
    for name in _local(folder).keys() - wanted.keys():
        (folder / name).unlink(missing_ok=True)
    for name, pem in wanted.items():
        write_atomically(folder / name, pem)


def _replace_links(root: Path, wanted: Mapping[str, str], rehash: Callable[[Path], None]) -> None:
    """The names by which OpenSSL looks in its folder: a hash of the subject, and a number where they clash."""
    hashed = root / HASHED
    hashed.mkdir(parents=True, exist_ok=True)
    for entry in list(os.scandir(hashed)):
        if entry.is_symlink() and os.path.basename(os.readlink(entry.path)).startswith(PREFIX):
            os.unlink(entry.path)
    if not wanted:
        return
    scratch = root / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, pem in wanted.items():
        (scratch / name).write_text(pem)
    rehash(scratch)
    links = [(entry.name, os.readlink(entry.path)) for entry in os.scandir(scratch) if entry.is_symlink()]
    shutil.rmtree(scratch)
    for link, name in sorted(links):
        _link(hashed, link.partition(".")[0], f"/{LOCAL}/{os.path.basename(name)}")


def _link(folder: Path, digest: str, target: str) -> None:
    """Under the first number that is free: OpenSSL looks no further than the first that is missing."""
    number = 0
    while True:
        with suppress(FileExistsError):
            os.symlink(target, folder / f"{digest}.{number}")
            return
        number += 1
