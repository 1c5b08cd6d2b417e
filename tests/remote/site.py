"""A machine, a user with its key, and the line between them, as one thing for tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.delay_line import DelayLine
from tests.remote.keys import Keys
from tests.remote.machine import Machine
from tests.remote.user import User, make_user


@dataclass(frozen=True)
class Site:
    """``account`` is who the user is on the machine; ``share`` a folder of the user's, ``there`` where it is to be seen."""

    directory: Path
    keys: Keys
    machine: Machine
    line: DelayLine
    user: User
    account: str

    @property
    def share(self) -> Path:
        return self.directory / "share"

    @property
    def there(self) -> str:
        return f"/mnt/{self.account}/share"

    @property
    def mount_option(self) -> tuple[str, str]:
        return "--mount", f"{self.share}:{self.there}"

    def sh(self, script: str, *, timeout: float = 60, status: int | None = 0) -> str:
        """The output of a script that the account runs on the machine, by no way of ours."""
        return self.machine.sh(script, self.account, timeout=timeout, status=status)

    def agent(self, plane: str) -> int:
        """The pid of the process on the machine that serves ``plane``."""
        found = self.agents(plane)
        assert len(found) == 1, self.machine.processes()
        return found[0]

    def agents(self, plane: str) -> list[int]:
        return [pid for pid, line in self.machine.agents().items() if f" daemon {plane} " in f"{line} "]


@contextmanager
def short_directory() -> Iterator[Path]:
    """One that all may enter, with a name that leaves room for sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="ac-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def site(account: str, *, homes_size: int = 0, hide: Sequence[str] = ()) -> Iterator[Site]:
    """A machine that ``ssh box`` would enter as ``account``. What is attached is detached at the end."""
    with short_directory() as directory:
        keys = Keys.make(directory / "keys")
        with (
            Machine(directory, keys, homes_size=homes_size, hide=hide) as machine,
            DelayLine(machine.door) as line,
        ):
            user = make_user(directory, "box")
            user.know(keys, line.port)
            user.configure(keys, line.port, account)
            (directory / "share").mkdir()
            made = Site(directory, keys, machine, line, user, account)
            try:
                yield made
            except BaseException:
                print(user.log())
                raise
            finally:
                user.agentctl("delete", "--data", "--yes", check=False, timeout=60)
