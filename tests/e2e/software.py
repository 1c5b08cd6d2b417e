"""Real programs for containers, as Debian packages them, in images that are made here.

The packages are unpacked, not installed: none of their scripts runs. That takes the mirror that the guest's own image
comes from, and no registry.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from typing import Final

from provision import recipe as recipes
from provision.commands import find_privilege
from tests.e2e.harness import Instance

ALONE: Final = """cd "$1/tmp" && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && apt-get -qq download {packages} >&2 &&
for each in *.deb; do dpkg-deb --fsys-tarfile "$each" | tar -x -C "$1"; done && rm ./*.deb"""
"""mmdebstrap's hook for packages of which only they are wanted, not what they need."""

#: Where Debian's programs expect to find each other.
LINKS: Final = {name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")}


def unpack(*packages: str, alone: Sequence[str] = ()) -> bytes:
    """``packages`` and what they need, and those ``alone``, as a tar."""
    recipe = recipes.load()
    command = [
        *find_privilege().mmdebstrap,
        "--quiet",
        "--variant=extract",
        f"--architectures={recipe.architecture}",
        f"--include={','.join(packages)}",
        *([f"--extract-hook={ALONE.format(packages=' '.join(alone))}"] if alone else []),
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Retries "3"',
        recipe.suite,
        "-",
        f"deb {recipe.mirror} {recipe.suite} main",
    ]
    environment = {"TMPDIR": "/var/tmp", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def make_image(
    vm: Instance,
    name: str,
    unpacked: bytes,
    kept: tuple[str, ...],
    *,
    files: Mapping[str, bytes],
    links: Mapping[str, str] = LINKS,
    folders: Sequence[tuple[str, int, int]] = (),
    command: str = "",
) -> str:
    """An image of what begins with one of ``kept``, and ``files`` besides; ``folders`` are a path, a mode, an owner."""
    image = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(unpacked)) as source,
        tarfile.open(fileobj=image, mode="w", format=tarfile.GNU_FORMAT) as target,
    ):
        for member in source:
            if member.name.startswith(kept):
                target.addfile(member, source.extractfile(member) if member.isreg() else None)
        for path, to in links.items():
            link = tarfile.TarInfo(path)
            link.type, link.linkname = tarfile.SYMTYPE, to
            target.addfile(link)
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(content), 0o644
            target.addfile(info, io.BytesIO(content))
        for path, mode, owner in folders:
            info = tarfile.TarInfo(path)
            info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, mode, owner, owner
            target.addfile(info)
    vm.docker("import", *(["-c", command] if command else []), "-", name, input=image.getvalue())
    return name
