"""Commands of the build: run with the right to own files as root, and ended whole when we leave early."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from provision.errors import ProvisionError

#: Whether a file can be given to another user. AppArmor (Ubuntu since 23.10) lets anybody make a user
#: namespace, and then denies what one is made for.
_OWNING_WORKS = """
file=$(mktemp)
chown 1:1 "$file" && [ "$(stat -c %u:%g "$file")" = 1:1 ] || { rm -f "$file"; exit 1; }
rm -f "$file"
"""

#: What of our environment sudo has to hand on: it starts with a fresh one.
_HANDED_ON = ("TMPDIR", "http_proxy", "https_proxy", "no_proxy")

#: What mmdebstrap takes to unmount and remove what it made when it is asked to stop, at the most, seconds.
STOP_TIME = 20.0


@dataclass(frozen=True, slots=True)
class Privilege:
    """How this user gets to own files as root: the words before a command, and mmdebstrap's."""

    prefix: tuple[str, ...]
    mmdebstrap: tuple[str, ...]


def find_privilege() -> Privilege:
    """Root's own, a user namespace's, or sudo's, which may ask for a password. Raises ``ProvisionError``."""
    if os.geteuid() == 0:
        return Privilege((), ("mmdebstrap", "--mode=root"))
    namespace = ("unshare", "--map-auto", "--map-root-user", "--")
    if shutil.which("newuidmap") and _succeeds([*namespace, "sh", "-ec", _OWNING_WORKS]):
        return Privilege(namespace, ("mmdebstrap", "--mode=unshare"))
    if shutil.which("sudo") and _sudo_works():
        environment = _environment()
        kept = (f"{name}={environment[name]}" for name in _HANDED_ON if name in environment)
        sudo = ("sudo", "-n", "env", *kept)
        return Privilege(sudo, (*sudo, "mmdebstrap", "--mode=root"))
    raise ProvisionError(
        "the image cannot be built as this user: neither user namespaces nor sudo can be used",
        "install uidmap and give yourself a range in /etc/subuid and /etc/subgid, or run this as root",
    )


def _sudo_works() -> bool:
    # A password is asked for now, at the terminal; the commands themselves run in the background of it.
    # In this order, because `sudo -v` asks for one also where none is needed to run commands.
    return _succeeds(["sudo", "-n", "true"]) or subprocess.run(["sudo", "-v"], check=False).returncode == 0


def _succeeds(command: list[str]) -> bool:
    quiet = subprocess.DEVNULL
    done = subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, check=False, env=_environment())
    return done.returncode == 0


@contextlib.contextmanager
def process(
    command: list[str],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is ended, all of it, if we leave early."""
    child = subprocess.Popen(
        command, stdin=stdin, stdout=stdout, stderr=stderr, process_group=0, env=_environment()
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            _end(child)
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def _environment() -> dict[str, str]:
    """Ours, with temporary files on a disk: /tmp is memory on many machines, and a root takes 1 GB."""
    return {"TMPDIR": "/var/tmp", **os.environ}


def _end(child: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, STOP_TIME), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
        except PermissionError:
            # Root's, by sudo.
            subprocess.run(["sudo", "-n", "kill", f"-{number.value}", "--", f"-{child.pid}"], check=False)
        except ProcessLookupError:
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=patience)
            return


def run(command: list[str], log: int | None) -> None:
    """Run ``command``, its output to the descriptor ``log``. Raises ``subprocess.CalledProcessError``."""
    with process(command, stdout=log, stderr=log) as child:
        if child.wait() != 0:
            raise subprocess.CalledProcessError(child.returncode, command)


def last_line(log: int) -> str:
    """The last line that was written to the file of the descriptor ``log``."""
    size = os.fstat(log).st_size
    lines = os.pread(log, 4096, max(0, size - 4096)).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
