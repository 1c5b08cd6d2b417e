"""The files plane on a machine that is no VM, of a user who is not root there and has another number than on the host.

The laws are the harness's. Two ordinary users of root's making: ``HOST``, who owns the folder and runs the file server,
and ``GUEST``, who runs the files agent, mounts through fusermount3, and is the only one to see the mount.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fileserver.control import GuestStage
from guest_agent import files
from guest_agent.transports import open_unix
from tests.files.harness import Folder, Plane
from tests.files.namespace import FORCE_DETACH, Namespace
from tests.files.service import SOURCES, FilesAgent

HOST: Final = 61001
GUEST: Final = 61002


def as_user(user: int, argv: Sequence[str]) -> list[str]:
    # The signal of UNTIL_WE_END once more: who becomes another user loses it. By way of env: what setpriv itself starts
    # is still looked for with root's capabilities.
    ids = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
    return ["setpriv", *ids, "--pdeathsig", "KILL", "--", "env", "--", *argv]


def obstacle() -> str:
    """Why there cannot be such a plane here; empty if there can."""
    if not any(os.access(f"{place}/fusermount3", os.X_OK) for place in os.environ["PATH"].split(os.pathsep)):
        return "needs fusermount3"
    can_import = as_user(
        GUEST, [sys.executable, "-c", "import msgpack, trio, guest_agent, host_agent.fileserver"]
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    if subprocess.run(can_import, env=environment, cwd="/", capture_output=True, check=False).returncode:
        return "this interpreter is not everybody's"
    return ""


class UsersNamespace(Namespace):
    """Commands in it are ``GUEST``'s."""

    def __enter__(self) -> UsersNamespace:
        super().__enter__()
        # There are machines where only root may open /dev/fuse; in here it is as udev leaves it. And fusermount3 wants
        # to know its user's name.
        device, passwd = self._top / "fuse", self._top / "passwd"
        passwd.write_text(f"{Path('/etc/passwd').read_text()}guest:x:{GUEST}:{GUEST}::/nonexistent:/bin/sh\n")
        passwd.chmod(0o644)
        subprocess.run(["mknod", "-m", "666", str(device), "c", "10", "229"], check=True)
        for source, target in ((device, "/dev/fuse"), (passwd, "/etc/passwd")):
            subprocess.run(super().command(["mount", "--bind", str(source), target]), check=True)
        return self

    def command(self, argv: Sequence[str]) -> list[str]:
        return super().command(as_user(GUEST, argv))

    def force_unmount(self) -> None:
        paths = [path for path, _ in reversed(self.mounts())]
        if paths:
            argv = [sys.executable, "-c", FORCE_DETACH, *paths]
            subprocess.run(super().command(argv), timeout=30, check=True)


class UsersAgent(FilesAgent):
    """A process that nobody keeps anything for."""

    def start(self, *, ready: float | None = None) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._namespace.command([sys.executable, "-m", __name__, str(self._guest_socket)]),
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(SOURCES)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self) -> None:
        """In good order."""
        self.kill(signal.SIGTERM)


class UsersPlane(Plane):
    """A ``Plane`` of these two."""

    def __init__(self, *folders: Folder) -> None:
        super().__init__(*folders, with_memory=False)

    def __enter__(self) -> UsersPlane:
        super().__enter__()
        with contextlib.ExitStack() as stack:
            stack.push(self.__exit__)
            for index in range(len(self.server.states().shares)):
                assert self.state(index).guest is GuestStage.MOUNTED, self.state(index).reason
            stack.pop_all()
        return self

    def _make_namespace(self) -> Namespace:
        for path in (self.directory, *self.host_root.rglob("*"), self.host_root):
            os.chown(path, HOST, HOST)
        os.chown(self.guest_root, GUEST, GUEST)
        return UsersNamespace(self.directory)

    def _make_agent(self, guest_socket: Path) -> FilesAgent:
        guest_socket.chmod(0o666)
        (self.directory / "host.sock").chmod(0o666)
        return UsersAgent(self.namespace, self.directory, guest_socket, None)

    def start_server(self) -> None:
        self.server.prefix = as_user(HOST, [])
        super().start_server()

    def host_sh(self, script: str) -> str:
        """Run a shell script in the folder, as its owner, and wait until the guest has heard of it; what it says."""
        argv = as_user(HOST, ["sh", "-ec", script])
        done = subprocess.run(argv, cwd=self.host, stdout=subprocess.PIPE, text=True, timeout=200, check=True)
        self.heard()
        return done.stdout


async def main(socket_path: str) -> None:
    await files.run(partial(open_unix, Path(socket_path)), vm=False)


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(main, sys.argv[1])
