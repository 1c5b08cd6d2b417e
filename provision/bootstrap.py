"""The guest's root filesystem, by mmdebstrap from Debian's packages and the recipe's own files."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from provision import commands
from provision.commands import Privilege
from provision.errors import ProvisionError
from provision.recipe import Recipe

Progress = Callable[[str], None]

_UNWANTED_PATHS = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")


def guest_overlay(files: Path) -> bytes:
    """The files below ``files`` as a tar: root's, readable by all, whatever the checkout's umask was."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(files.rglob("*")):
            info = tarfile.TarInfo(str(path.relative_to(files)))
            if path.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            else:
                content = path.read_bytes()
                info.size, info.mode = len(content), 0o755 if path.stat().st_mode & 0o100 else 0o644
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def bootstrap(root: Path, recipe: Recipe, privilege: Privilege, progress: Progress, log: int) -> None:
    """mmdebstrap's tar, unpacked as it comes. Device nodes stay out: the kernel makes its own."""
    overlay = root.parent / "overlay.tar"
    overlay.write_bytes(guest_overlay(recipe.guest_files))
    extract = ["tar", "-x", "--numeric-owner", "--xattrs", "--exclude=./dev/*", "-C", str(root)]
    with contextlib.ExitStack() as stack:
        producer = stack.enter_context(
            commands.process(
                mmdebstrap_command(recipe, overlay, privilege.mmdebstrap),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
        assert producer.stdout is not None
        assert producer.stderr is not None
        consumer = stack.enter_context(
            commands.process([*privilege.prefix, *extract], stdin=producer.stdout, stderr=log)
        )
        producer.stdout.close()
        tail = _follow(producer.stderr, progress, log)
        failed = producer.wait() != 0
        failed_unpack = consumer.wait() != 0
    overlay.unlink()
    # In this order: if mmdebstrap fails, tar fails for want of an archive. A tar that cannot write reads on.
    if failed:
        raise ProvisionError(f"mmdebstrap failed: {tail}", _bootstrap_hint(tail))
    if failed_unpack:
        raise ProvisionError("unpacking the root filesystem failed", "check that the disk is not full")


def _bootstrap_hint(tail: str) -> str:
    if "No space left" in tail or "Broken pipe" in tail:
        return "free some space (mmdebstrap also works in TMPDIR) and try again"
    return "check that the Debian mirror of provision/recipe.toml can be reached, and try again"


def mmdebstrap_command(recipe: Recipe, overlay: Path, program: tuple[str, ...]) -> list[str]:
    """The command that writes the recipe's root filesystem as a tar to its standard output.

    ``overlay`` is the tar that ``guest_overlay`` made of the recipe's own files.
    """
    # mmdebstrap splits a hook as a shell would.
    unpack_overlay = f"tar-in {shlex.quote(str(overlay))} /"
    hooks = [
        unpack_overlay,
        'chmod 0440 "$1/etc/sudoers.d/agentctl"',
        # The kernel is unpacked, not installed: installing it would pull in initramfs-tools and make an
        # initrd that nobody boots.
        'chroot "$1" sh -ec \'cd /tmp && apt-get -qq -o APT::Sandbox::User=root download '
        f'"$(apt-cache depends {recipe.kernel_package} | sed -n "s/^  Depends: //p" | grep -m1 ^linux-image)" '
        "&& dpkg-deb -x linux-image-*.deb / && rm linux-image-*.deb'",
        'chroot "$1" sh -c \'dpkg-query -W -f "\\${Package}\\t\\${Version}\\n" >/usr/lib/agentctl/packages\'',
        'chroot "$1" /usr/lib/agentctl/finish-build',
        # Again, last: packages and their removal may have written over these files.
        unpack_overlay,
    ]
    return [
        *program,
        "--variant=apt",
        # Its last step would empty /etc/machine-id, and every boot would count as the first.
        "--skip=cleanup/reproducible",
        f"--architectures={recipe.architecture}",
        f"--include={','.join(recipe.packages)}",
        *(f"--dpkgopt=path-exclude={path}" for path in _UNWANTED_PATHS),
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Retries "3"',
        *(f"--customize-hook={hook}" for hook in hooks),
        recipe.suite,
        "-",
        f"deb {recipe.mirror} {recipe.suite} main",
        f"deb {recipe.mirror} {recipe.suite}-updates main",
        f"deb {recipe.security_mirror} {recipe.suite}-security main",
    ]


def _follow(stream: Iterable[bytes], progress: Progress, log: int) -> str:
    """Pass mmdebstrap's own steps on; return the line that most likely says why it failed."""
    last = error = ""
    for raw in stream:
        os.write(log, raw)
        line = raw.decode(errors="replace").strip()
        if line.startswith("I: "):
            # Hooks are our own commands; the log has them.
            if "hook" not in line:
                progress(line[3:].rstrip("."))
        elif line.startswith("E:"):
            error = line
        last = line or last
    return error or last
