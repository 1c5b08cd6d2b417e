"""What a user has answered on the way to a machine, for the host agent that goes there again without them.

The law: a passphrase or a password is in memory and nowhere else: in a file without a name, which keeper and host agent
hand on to their successors as a descriptor. It goes with the last of them. A host key is never trusted from here. And
a code for one login is said once: a machine that counts what it refuses would lock the account.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping

#: Bytes of all of them; a file of ours cannot have more.
MAX_SIZE = 64 * 1024


def is_for_one_login(question: str) -> bool:
    """Whether the machine asks for what is another one each time: a code of an app, of a token, of a message.

    Nobody says so. What a machine asks of its own accord (``connection``: "ME@HOST asks: ...") and does not call a
    password is taken for that; who is wrong about it asks once too often.
    """
    said = question.lower()
    return " asks: " in said and ("password" not in said or "one-time" in said or "one time" in said)


def keep(answers: Mapping[str, str]) -> int | None:
    """A descriptor of a file that has them; None if there are none."""
    if not answers:
        return None
    content = json.dumps(dict(answers)).encode()
    if sys.platform == "linux":
        descriptor = os.memfd_create("agentctl-answers", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.write(descriptor, content)
    return descriptor


def read(descriptor: int | None) -> dict[str, str]:
    """Those of ``keep``. Its place in the file is everybody's, and is left alone."""
    if descriptor is None:
        return {}
    try:
        values = json.loads(os.pread(descriptor, MAX_SIZE, 0))
    except (OSError, ValueError):
        return {}
    return {str(question): str(answer) for question, answer in values.items()}


def take(descriptor: int | None) -> dict[str, str]:
    """As ``read``; whoever reads after us finds no answer that is for one login."""
    found = read(descriptor)
    left = {question: answer for question, answer in found.items() if not is_for_one_login(question)}
    if descriptor is not None and left != found:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(left).encode(), 0)
    return found
