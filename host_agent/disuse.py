"""What agentctl keeps on this machine's disk and nobody uses: for ``agentctl prune`` and ``agentctl image``.

The law: what could be used is not listed. An image is in use if the next start would take it, or if it is below the
overlay of an instance, which exists as long as that instance runs, whether its host agent answers or not. Data disks
are never disused; they go with ``agentctl delete --data``.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from host_agent import docker_context, docker_tools
from host_agent.configuration import config as configuration
from host_agent.configuration.config import Host
from host_agent.errors import UserError
from host_agent.paths import Home
from provision import manifest as manifests
from provision import recipe as recipes
from provision import store
from provision.manifest import Manifest

#: The beginning of a qcow2 file: magic, version, where the name of the file below it is, and how long (docs/interop/
#: qcow2.txt of QEMU).
_QCOW2: Final = struct.Struct(">4sIQI")
_QCOW2_MAGIC: Final = b"QFI\xfb"
_MAX_NAME: Final = 4096


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of the store. ``size`` in bytes on the disk; ``manifest`` is None if it is damaged.

    ``current``: it is what a next start takes. ``used_by`` are instances that run on it.
    """

    path: Path
    size: int
    manifest: Manifest | None
    current: bool
    used_by: tuple[str, ...]

    @property
    def in_use(self) -> bool:
        return self.current or bool(self.used_by)


@dataclass(frozen=True, slots=True)
class Unused:
    """Something that may go: what it is, in words, and its size in bytes on the disk."""

    what: str
    path: Path
    size: int
    remove: Callable[[], object]


def stored_images(home: Home) -> list[StoredImage]:
    """All images. Raises ``ProvisionError`` if the recipe cannot be read."""
    users, wanted = _users(home), _wanted(home)
    found = []
    for path in store.stored(home.images):
        manifest = None
        with contextlib.suppress(OSError, ValueError, TypeError):
            manifest = manifests.read(path)
        used_by = tuple(users.get(os.path.realpath(path), ()))
        found.append(StoredImage(path, size_of(path), manifest, path.name in wanted, used_by))
    return found


def unused_images(home: Home) -> list[Unused]:
    """Images, and what builds have left, if none is at work."""
    unused = [
        Unused(f"image {each.path.name}", each.path, each.size, partial(store.remove, home.images, each.path))
        for each in stored_images(home)
        if not each.in_use
    ]
    return unused + [
        Unused("remains of a build", path, size_of(path), partial(store.remove, home.images, path))
        for path in store.leftovers(home.images)
    ]


def unused(home: Home, environ: Mapping[str, str]) -> list[Unused]:
    """All that nobody uses."""
    return [
        *unused_images(home),
        *_superfluous_tools(home, environ),
        *_stale_contexts(home, environ),
        *_verdicts(home),
    ]


def _superfluous_tools(home: Home, environ: Mapping[str, str]) -> Iterator[Unused]:
    for tool, path in docker_tools.superfluous(home.tools, environ):
        remove = partial(docker_tools.remove, home.tools, tool, environ)
        yield Unused(f"docker's {tool.name}, which this machine has itself", path, size_of(path), remove)


def _stale_contexts(home: Home, environ: Mapping[str, str]) -> Iterator[Unused]:
    """Of instances whose folder somebody has removed by hand."""
    directory = docker_context.config_dir(environ)
    for name, socket in docker_context.of_sockets_below(directory, home.root / "instances").items():
        if not socket.parent.exists():
            remove = partial(docker_context.delete, directory, name)
            yield Unused(f"docker context {name}, of an instance that is gone", socket.parent, 0, remove)


def _verdicts(home: Home) -> Iterator[Unused]:
    path = home.cache / "accelerators.json"
    if path.exists():
        remove = partial(path.unlink, missing_ok=True)
        yield Unused("remembered trials of accelerators", path, size_of(path), remove)


def size_of(path: Path) -> int:
    """Bytes that a file, or all below a folder, takes on the disk; of what cannot be looked at, 0."""
    total = 0
    with contextlib.suppress(OSError):
        status = path.lstat()
        total = status.st_blocks * 512
        if stat.S_ISDIR(status.st_mode):
            total += sum(map(size_of, path.iterdir()))
    return total


def _wanted(home: Home) -> frozenset[str]:
    """The digests of the images that the next starts take, of whichever instance.

    A new instance is like the template; one whose configuration cannot be read may want any.
    """
    runtimes = {recipes.DOCKER}
    for paths in {home.instance(), *home.instances()}:
        try:
            runtimes.add(configuration.load(paths, Host.measure()).runtime)
        except UserError:
            runtimes.update(recipes.RUNTIMES)
    return frozenset(recipes.load(runtime=runtime).digest for runtime in runtimes)


def _users(home: Home) -> dict[str, list[str]]:
    """The folders of images, with the instances whose overlay is on one."""
    users: dict[str, list[str]] = {}
    for paths in home.instances():
        if (base := backing_file(paths.root_overlay)) is not None:
            users.setdefault(os.path.realpath(base.parent), []).append(paths.name)
    return users


def backing_file(overlay: Path) -> Path | None:
    """The file below a qcow2 file; None if there is none."""
    try:
        with overlay.open("rb") as file:
            magic, _, offset, length = _QCOW2.unpack(file.read(_QCOW2.size))
            if magic != _QCOW2_MAGIC or not offset or length > _MAX_NAME:
                return None
            file.seek(offset)
            return Path(os.fsdecode(file.read(length)))
    except (OSError, struct.error, ValueError):
        return None
