"""QEMU with a few devices more: run in QEMU's place, by a script of that name in front of it on PATH.

    python machine.py CONFIGURATION QEMU-ARGUMENT...

The bench VM is an ordinary instance, started by the ordinary ``agentctl up``; the product knows nothing of
its peers. What they need is added to QEMU's command line here: shared memory and a vhost-user-fs device
for virtiofs, and ports of the host's that lead into the guest (to its sshd, as Lima has it, too).
Any other use of QEMU (its version, the probe of an accelerator) passes through unchanged.

The law: virtiofsd serves one connection, so each QEMU gets one of its own. It is told to end when this
process, which becomes QEMU, ends, and ends by itself when QEMU closes the connection.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TAG = "bench"


@dataclass(frozen=True, slots=True)
class Devices:
    """``qemu`` is the real one. ``virtiofsd`` is the command of a daemon that is to be given a socket
    listening at ``socket``, empty without virtiofs; its output goes to ``log``. ``ports`` are pairs: a port of
    localhost, and the guest's port that QEMU's user network lets it lead to (``hostfwd``)."""

    qemu: str
    ports: tuple[tuple[int, int], ...] = ()
    virtiofsd: tuple[str, ...] = ()
    socket: str = ""
    log: str = os.devnull

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Devices:
        values = json.loads(path.read_text())
        ports = tuple((host, guest) for host, guest in values["ports"])
        return cls(**{**values, "ports": ports, "virtiofsd": tuple(values["virtiofsd"])})


def is_machine(arguments: Sequence[str]) -> bool:
    """Whether this is an instance's machine, which alone has a network, and no probe or ``--version``."""
    return "-netdev" in arguments


def with_devices(arguments: Sequence[str], devices: Devices) -> list[str]:
    """``arguments`` of QEMU and what the peers need. Memory is shared as virtiofs wants it
    (https://virtio-fs.gitlab.io/howto-qemu.html)."""
    result = list(arguments)
    network = result.index("-netdev") + 1
    for host, guest in devices.ports:
        result[network] += f",hostfwd=tcp:127.0.0.1:{host}-:{guest}"
    if devices.virtiofsd:
        given = result[result.index("-m") + 1]
        if (found := re.match(r"(?:size=)?(\d+M)(?:,|$)", given)) is None:
            raise ValueError(f"QEMU's -m is {given!r}; a number of MiB was expected")
        memory = found[1]
        # fmt: off
        result += [
            "-object", f"memory-backend-memfd,id=bench-memory,size={memory},share=on",
            "-machine", "memory-backend=bench-memory",
            "-chardev", f"socket,id=bench-virtiofs,path={devices.socket.replace(',', ',,')}",
            "-device", f"vhost-user-fs-pci,chardev=bench-virtiofs,tag={TAG}",
        ]
        # fmt: on
    return result


def start_virtiofsd(devices: Devices) -> None:
    """Start it with the socket that QEMU will connect to. Given a name instead of a descriptor, virtiofsd
    would want to make /run/virtiofsd, which only root may."""
    Path(devices.socket).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, open(devices.log, "ab") as log:
        listener.bind(devices.socket)
        listener.listen(1)
        subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *devices.virtiofsd, f"--fd={listener.fileno()}"],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def main() -> None:
    devices = Devices.read(Path(sys.argv[1]))
    arguments = sys.argv[2:]
    if is_machine(arguments):
        if devices.virtiofsd:
            start_virtiofsd(devices)
        arguments = with_devices(arguments, devices)
    os.execv(devices.qemu, [devices.qemu, *arguments])


if __name__ == "__main__":
    main()
