"""Builds the guest image from its recipe: kernel, initrd, root filesystem and manifest.

The law: an image is complete or it is not there. Everything is made in a build directory beside the
images and renamed into place as the last step, so neither a full disk, a ^C nor a power cut can leave
something that looks like an image and is not. One build at a time per store; a build directory whose
builder is gone is swept by the next one.

As an ordinary user the whole build runs in a user namespace (subordinate ids from /etc/subuid), as root
it runs plainly, and where user namespaces are forbidden it asks sudo for the few steps that need it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from provision import commands, initrd
from provision import manifest as manifests
from provision.bootstrap import Progress, bootstrap
from provision.commands import Privilege
from provision.errors import ProvisionError
from provision.manifest import Manifest
from provision.recipe import Recipe

#: What a build needs at its worst moment: the extracted root (1.1 GB), the image (1.2 GB), and air.
BUILD_SPACE = 4 * 1024**3

_NEEDED = {
    "mmdebstrap": "mmdebstrap",
    "tar": "tar",
    "mke2fs": "e2fsprogs",
}


@dataclass(frozen=True, slots=True)
class Image:
    """A complete image in its directory."""

    directory: Path
    manifest: Manifest

    @property
    def kernel(self) -> Path:
        return self.directory / "kernel"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def root(self) -> Path:
        """The root filesystem: raw, sparse ext4; only ever opened read-only, beneath an overlay."""
        return self.directory / "root.img"


def find(store: Path, digest: str) -> Image | None:
    """The image named ``digest``, or None; a damaged one counts as absent."""
    directory = store / digest
    try:
        manifest = manifests.read(directory)
    except (OSError, ValueError, TypeError):
        return None
    image = Image(directory, manifest)
    complete = all(path.is_file() for path in (image.kernel, image.initrd, image.root))
    return image if complete else None


def ensure(store: Path, recipe: Recipe, progress: Progress) -> Image:
    """The recipe's image, built if it is not in ``store`` yet (minutes; ``progress`` gets a line at a time).

    Raises ``ProvisionError`` when it cannot be built; then the store is as it was.
    """
    image = find(store, recipe.digest)
    if image is not None:
        return image
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(store, progress):
        # Whoever held the lock may have built just this one.
        return find(store, recipe.digest) or _build(store, recipe, progress)


@contextlib.contextmanager
def _lock(store: Path, progress: Progress) -> Iterator[None]:
    descriptor = os.open(store / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build of an image to finish")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_tools() -> None:
    missing = [package for tool, package in _NEEDED.items() if not shutil.which(tool)]
    if missing:
        raise ProvisionError(
            f"building the image needs {', '.join(missing)}", f"sudo apt-get install {' '.join(missing)}"
        )


def _check_space(store: Path) -> None:
    free = shutil.disk_usage(store).free
    if free < BUILD_SPACE:
        raise ProvisionError(
            f"building the image needs {BUILD_SPACE >> 30} GiB in {store}, and {free / 2**30:.1f} GiB are free",
            "free some space, or set AGENTCTL_HOME to a folder on a larger disk",
        )


def _build(store: Path, recipe: Recipe, progress: Progress) -> Image:
    _check_tools()
    _check_space(store)
    privilege = commands.find_privilege()
    _sweep(store, privilege)
    work = store / f".build-{recipe.digest}"
    try:
        work.mkdir(mode=0o700)
        _build_in(work, recipe, privilege, progress)
        final = store / recipe.digest
        if final.exists():
            shutil.rmtree(final)
        work.rename(final)
    except OSError as error:
        hint = f"free some space and try again; the whole story is in {_keep_log(work, store)}"
        raise ProvisionError(f"building the image failed: {error}", hint) from error
    except ProvisionError as error:
        hint = f"{error.hint}; the whole story is in {_keep_log(work, store)}"
        raise ProvisionError(error.message, hint) from error
    finally:
        _sweep(store, privilege)
    image = find(store, recipe.digest)
    if image is None:
        raise ProvisionError("the image vanished while it was built", "try again")
    return image


def _keep_log(work: Path, store: Path) -> Path:
    """Move the log of a failed build to where the sweep does not find it."""
    kept = store / "failed-build.log"
    with contextlib.suppress(OSError):
        (work / "build.log").replace(kept)
    return kept


def _sweep(store: Path, privilege: Privilege) -> None:
    """Remove build directories; the store's lock is held, so nobody is building in one."""
    for leftover in store.glob(".build-*"):
        _remove(leftover, privilege)


def _remove(tree: Path, privilege: Privilege) -> None:
    """Remove what may belong to users of the namespace; what is left of it, the next sweep takes."""
    command = [*privilege.prefix, "rm", "-rf", "--one-file-system", str(tree)]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=False)


def _build_in(work: Path, recipe: Recipe, privilege: Privilege, progress: Progress) -> None:
    root = work / "root"
    root.mkdir()
    with (work / "build.log").open("wb+") as log:
        progress(f"installing Debian {recipe.suite} packages")
        bootstrap(root, recipe, privilege, progress, log.fileno())
        progress("making the initrd")
        release = _kernel_release(root)
        shutil.copyfile(root / "boot" / f"vmlinuz-{release}", work / "kernel")
        init = (recipe.guest_files / "usr/lib/agentctl/init").read_bytes()
        wanted = {
            "alone": recipe.alone_modules,
            "order": recipe.initrd_modules,
            "beside": recipe.bulk_modules,
        }
        archive = initrd.build(root, release, wanted, init)
        (work / "initrd").write_bytes(archive)
        progress("making the root filesystem")
        _make_filesystem(root, work / "root.img", recipe, privilege, log.fileno())
    packages = manifests.packages(root)
    _remove(root, privilege)
    progress("writing the manifest")
    manifests.write(work, recipe, release, packages)


def _kernel_release(root: Path) -> str:
    releases = sorted(path.name for path in (root / "lib/modules").iterdir())
    if len(releases) != 1:
        raise ProvisionError(f"expected one kernel in the root, found {releases}", "check the recipe")
    return releases[0]


def _make_filesystem(root: Path, image: Path, recipe: Recipe, privilege: Privilege, log: int) -> None:
    image.touch(mode=0o600)
    os.truncate(image, recipe.root_size)
    # No journal: what is written to it is thrown away at the end of the boot.
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", "agentctl-root", "-m", "0"]
    extended = ["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"]
    try:
        commands.run([*privilege.prefix, "mke2fs", *options, *extended, "-d", str(root), str(image)], log)
    except subprocess.CalledProcessError as error:
        raise ProvisionError(
            f"mke2fs failed: {commands.last_line(log)}", "check that the disk is not full"
        ) from error
