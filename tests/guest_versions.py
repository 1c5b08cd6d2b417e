"""Runs the tests of protocol/ and guest_agent/ on the guest's own Python and package versions.

    python tests/guest_versions.py DIRECTORY [--make-only | PYTEST ARGUMENT ...]

A small root of the guest's Debian release, with the agent's packages and pytest from the same archive,
is made in DIRECTORY (once per recipe), and pytest runs in it: Debian's interpreter, trio, C msgpack and
pyroute2, at native speed, without a VM. An ordinary user needs user namespaces, as for the image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from provision import recipe as recipes
from provision.recipe import Recipe

SOURCES = Path(__file__).resolve().parent.parent
TEST_PACKAGES = [
    "python3-pytest",
    "python3-pytest-trio",
    "python3-pytest-xdist",
    "python3-hypothesis",
    "fuse3",
    "iproute2",
    "procps",
    "mount",
    "openssl",
]

# Runs as root of its namespaces. The sources are bound read-only; everything else of the host stays out. Not a chroot:
# tests make mount namespaces, whose root is the one that is mounted there.
INSIDE = """
set -eu
root=$1; sources=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mkdir -p "$root/src" "$root/proc" "$root/sys" "$root/dev"
ln -sfn ../proc/self/mounts "$root/etc/mtab"  # as any system has it
mount --bind "$sources" "$root/src"
mount -o remount,ro,bind "$root/src"
mount --rbind /proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
cd "$root"
pivot_root . .
umount -l .
exec chroot . env -i PATH=/usr/sbin:/usr/bin HOME=/tmp LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \
    sh -c 'cd /src && exec "$@"' sh python3 -m pytest -q -p no:cacheprovider "$@" tests/protocol tests/guest_agent
"""


def namespace() -> list[str]:
    # No pid namespace of its own: the pids of the kernel's trace would not be ours.
    prefix = ["unshare", "--mount"]
    return prefix if os.geteuid() == 0 else [*prefix, "--map-auto", "--map-root-user"]


def in_namespace(command: list[str]) -> None:
    subprocess.run([*namespace(), *command], check=True)


def make_root(root: Path, recipe: Recipe) -> None:
    """The root of ``recipe``'s release with the agent's Python packages, unless it is there already."""
    stamp = root / ".complete"
    contents = " ".join([recipe.digest, *TEST_PACKAGES])
    if stamp.exists() and stamp.read_text() == contents:
        return
    if root.exists():
        in_namespace(["rm", "-rf", str(root)])
    root.mkdir(parents=True)
    agent = [package for package in recipe.packages if package.startswith("python3")]
    mode = "root" if os.geteuid() == 0 else "unshare"
    bootstrap = subprocess.Popen(
        [
            "mmdebstrap",
            "--quiet",
            f"--mode={mode}",
            "--variant=minbase",
            f"--include={','.join([*agent, *TEST_PACKAGES])}",
            '--aptopt=APT::Install-Recommends "false"',
            recipe.suite,
            "-",
            f"deb {recipe.mirror} {recipe.suite} main",
            f"deb {recipe.security_mirror} {recipe.suite}-security main",
        ],
        stdout=subprocess.PIPE,
    )
    unpack = ["tar", "-x", "--numeric-owner", "--exclude=./dev/*", "-C", str(root)]
    subprocess.run([*namespace(), *unpack], stdin=bootstrap.stdout, check=True)
    if bootstrap.wait() != 0:
        raise SystemExit("mmdebstrap failed")
    stamp.write_text(contents)


def main() -> int:
    root = Path(sys.argv[1]).absolute()
    for tool in ("mmdebstrap", "unshare"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing")
    make_root(root, recipes.load())
    if sys.argv[2:] == ["--make-only"]:
        return 0
    arguments = [str(root), str(SOURCES), *sys.argv[2:]]
    return subprocess.run([*namespace(), "sh", "-c", INSIDE, "sh", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
