"""SSH keys of a test run: a host's and a user's, made by ssh-keygen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.remote.sshd import make_key


@dataclass(frozen=True, slots=True)
class Keys:
    """Where they are: each with its public half beside it (``.pub``)."""

    host: Path
    user: Path

    @classmethod
    def make(cls, directory: Path) -> Keys:
        directory.mkdir(parents=True, exist_ok=True)
        return cls(make_key(directory / "host_key"), make_key(directory / "user_key"))

    @property
    def host_private(self) -> str:
        return self.host.read_text()

    @property
    def host_public(self) -> str:
        return self.host.with_suffix(".pub").read_text()

    @property
    def user_public(self) -> str:
        return self.user.with_suffix(".pub").read_text()
