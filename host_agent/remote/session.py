"""What the two agents of an attached instance are found by on the machine, however often the host comes back.

The law: the same instance of the same user of the same host has the same name for as long as it exists, and no
other has it: a folder of agentctl's that was copied to another host does not take over the first one's agents.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import Final

from host_agent.errors import UserError
from host_agent.paths import Home

_MACHINE_ID: Final = Path("/etc/machine-id")
#: So much of the instance's name, for people who look at the machine, a hyphen, and hex digits: 40 in all.
_NAME: Final = 23
_DIGITS: Final = 16


def session_name(home: Home, instance: str, machine_id: Path = _MACHINE_ID) -> str:
    """``[a-z0-9-]``, 40 at the most; raises ``UserError`` if ``home`` cannot be written to."""
    host = b""
    with contextlib.suppress(OSError):
        host = machine_id.read_bytes().strip()
    parts = (
        host,
        _token(home).encode(),
        str(os.getuid()).encode(),
        os.fsencode(home.root),
        instance.encode(),
    )
    digest = hashlib.sha256(b"agentctl session\0" + b"\0".join(parts)).hexdigest()
    return f"{instance[:_NAME]}-{digest[:_DIGITS]}"


def _token(home: Home) -> str:
    """Random, made once: two containers of one image have the same machine-id."""
    path = home.root / "attach-id"
    new = path.with_name(f".attach-id-{secrets.token_hex(8)}")
    try:
        if not path.exists():
            new.write_text(secrets.token_hex(16) + "\n")
            # Whoever is first; a link never replaces.
            with contextlib.suppress(FileExistsError):
                os.link(new, path)
        return path.read_text().strip()
    except OSError as error:
        raise UserError(f"cannot use {path}: {error.strerror}", "make that folder writable") from error
    finally:
        new.unlink(missing_ok=True)
