"""/var/run/docker.sock on this machine, for programs that look nowhere else, as a link to an instance's socket.

The law: only what leads to this instance is ours. Anything else that is there, a dockerd's socket most of all, is
neither replaced nor removed; and what needs root is said, not done. The link leads into the user's private folder, so
it is of no use to others.
"""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths

USUAL = Path("/var/run/docker.sock")

#: /run is empty after each boot; what systemd makes there anew (tmpfiles.d(5)). An L replaces nothing.
TMPFILES = "/etc/tmpfiles.d/agentctl-docker.conf"


class Place(Enum):
    """What is at the usual place."""

    FREE = "free"
    OURS = "linked"
    FOREIGN = "taken"


@dataclass(frozen=True, slots=True)
class DockerSock:
    """The usual place, and the instance that is to be found there."""

    paths: InstancePaths
    place: Path = USUAL

    def look(self) -> Place:
        try:
            if os.readlink(self.place) == str(self.paths.docker_socket):
                return Place.OURS
        except FileNotFoundError:
            return Place.FREE
        except OSError:
            pass  # no link, or in a folder that others may not see
        return Place.FOREIGN

    def describe(self) -> str:
        """What is there, in a clause."""
        match self.look():
            case Place.FREE:
                return f"there is no {self.place}"
            case Place.OURS:
                return f"{self.place} leads to instance {self.paths.name}"
        try:
            if (leads := os.readlink(self.place)) != "":
                return f"{self.place} leads to {leads}"
        except OSError:
            pass
        try:
            is_socket = stat.S_ISSOCK(os.lstat(self.place).st_mode)
        except OSError:
            is_socket = False
        return f"{self.place} is {'the socket of another Docker' if is_socket else 'no socket'}"

    def link(self) -> bool:
        """Have it lead to the instance; whether something had to be changed.

        Raises ``UserError`` if something else is there, or with what to type if this user may not.
        """
        match self.look():
            case Place.OURS:
                return False
            case Place.FOREIGN:
                raise UserError(
                    f"{self.describe()}, and is left alone",
                    "remove it yourself if nobody needs it; without it: docker context use, or DOCKER_HOST",
                    ExitCode.USAGE,
                )
        try:
            os.symlink(self.paths.docker_socket, self.place)
        except FileExistsError:
            return self.link()  # somebody was faster
        except OSError as error:
            raise UserError(
                f"{self.place} cannot be made by you: {error.strerror}",
                f"make it with: {self.link_command()}; for each boot: {self.boot_command()}",
            ) from None
        return True

    def unlink(self) -> bool:
        """Undo that; whether something had to be changed. Raises ``UserError`` with what to type, if it may not."""
        if self.look() is not Place.OURS:
            return False
        try:
            os.unlink(self.place)
        except OSError as error:
            raise UserError(
                f"{self.place} cannot be removed by you: {error.strerror}",
                f"remove it with: {self.unlink_command()}",
            ) from None
        return True

    def link_command(self) -> str:
        return shlex.join(["sudo", "ln", "-sT", str(self.paths.docker_socket), str(self.place)])

    def unlink_command(self) -> str:
        return shlex.join(["sudo", "rm", "-f", str(self.place), TMPFILES])

    def boot_command(self) -> str:
        line = f"L {self.place} - - - - {self.paths.docker_socket}"
        return f"echo {shlex.quote(line)} | sudo tee {TMPFILES}"
