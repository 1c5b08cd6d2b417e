"""The first process of a machine (``tests.remote.machine``): makes it, lets in who knocks, and collects the dead.

    /usr/bin/python3 -I machine_init.py <JSON

It runs in namespaces of its own for mounts, processes and the network, with Debian's Python and nothing else, since what
is a folder of the test run's is hidden here: users have homes on a filesystem of the machine's, /tmp and /run are empty.
JSON: ``door`` (path of the unix socket that leads to sshd), ``etc`` (files to be found in /etc), ``keys`` (what is put
into /run/sshd), ``port`` (sshd's), ``users`` (name: [uid, home]), ``homes_size`` (bytes; 0: enough), ``authorized``, ``hide`` (programs).
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MS_BIND = 2, 4, 4096
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
SSHD = "/usr/sbin/sshd"


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    done = LIBC.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    if done != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def leave_fuse() -> None:
    """What users of this system have mounted is not this machine's: whoever forces its mounts would abort theirs."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        found = [line.split(" ")[1:3] for line in mounts]
    for path, kind in reversed(found):
        if kind == "fuse" or kind.startswith("fuse."):
            LIBC.umount2(
                os.fsencode(path).decode("unicode_escape").encode("latin-1"), MNT_DETACH | UMOUNT_NOFOLLOW
            )


def loopback_up() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14s", b"lo", 0x1, b""))  # SIOCSIFFLAGS, IFF_UP


def write(path: str, text: str, mode: int, owner: int = 0) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, mode)
    os.chown(path, owner, owner)


def make_home(uid: int, home: str, authorized: str) -> None:
    for folder in (home, f"{home}/.ssh"):
        os.mkdir(folder, 0o700)
        os.chown(folder, uid, uid)
    write(f"{home}/.ssh/authorized_keys", authorized, 0o600, uid)


def make(machine: dict) -> None:
    leave_fuse()
    loopback_up()
    mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    os.mkdir("/run/sshd", 0o755)
    # As udev would have it; here it may be root's.
    os.mknod("/run/fuse", stat.S_IFCHR, os.makedev(10, 229))
    os.chmod("/run/fuse", 0o666)
    mount("/run/fuse", "/dev/fuse", "", MS_BIND)
    for name, text in machine["keys"].items():
        write(f"/run/sshd/{name}", text, 0o600)
    for name, text in machine["etc"].items():
        write(f"/run/sshd/{name}", text, 0o644)
        mount(f"/run/sshd/{name}", f"/etc/{name}", "", MS_BIND)
    for path in machine["hide"]:
        mount("/dev/null", path, "", MS_BIND)
    size = f",size={machine['homes_size']}" if machine["homes_size"] else ""
    mount("tmpfs", "/mnt", "tmpfs", MS_NODEV, f"mode=755{size}")
    mount("tmpfs", "/tmp", "tmpfs", MS_NODEV, "mode=1777")
    for uid, home in machine["users"].values():
        make_home(uid, home, machine["authorized"])


def carry(one: socket.socket, other: socket.socket) -> None:
    """Bytes from the one to the other, until either ends."""
    try:
        while data := one.recv(1 << 16):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        for side in (one, other):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


def let_in(visitor: socket.socket, port: int) -> None:
    """One who knocks at the door is brought to sshd."""
    with visitor, socket.create_connection(("127.0.0.1", port)) as inside:
        inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=carry, args=(inside, visitor))
        back.start()
        carry(visitor, inside)
        back.join()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def collect(*_: object) -> None:
    """Whoever loses its parent is ours; sshd is waited for like them, as nobody asks for its status."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main() -> None:
    machine = json.load(sys.stdin)
    door = socket.socket(socket.AF_UNIX)
    door.bind(machine["door"])
    door.listen(64)
    make(machine)
    port = machine["port"]
    signal.signal(signal.SIGCHLD, collect)
    subprocess.Popen([SSHD, "-D", "-f", "/run/sshd/sshd_config", "-E", "/run/sshd/log"], cwd="/")
    while not answers(port):
        time.sleep(0.05)
    print("ready", flush=True)
    while True:
        visitor, _ = door.accept()
        threading.Thread(target=let_in, args=(visitor, port), daemon=True).start()


if __name__ == "__main__":
    main()
