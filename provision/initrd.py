"""The guest's initrd: one static busybox, one script, the few modules that root, network and shared memory need.

Written here, byte by byte in the ``newc`` cpio format (Documentation/driver-api/early-userspace/
buffer-format.rst), instead of by initramfs-tools: 2 MB instead of 30, uncompressed, so that neither
loading nor unpacking shows in the boot. It has no times and no owners, so equal inputs make equal bytes.
"""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from provision.errors import ProvisionError

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, directory or device of the archive. ``mode`` includes the type bits of ``st_mode``."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, content: bytes, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, content)


def cpio(entries: Iterable[Entry]) -> bytes:
    """The archive of ``entries``, in order, as ``newc`` cpio."""
    archive = bytearray()
    for inode, entry in enumerate([*entries, Entry(_TRAILER, 0)], start=1):
        name = entry.name.encode() + b"\0"
        major, minor = entry.device
        # magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        # namesize, check: 110 bytes, each number 8 hex digits.
        numbers = (inode, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, major, minor, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % number for number in numbers) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def module_load_order(modules_dep: str, wanted: Iterable[str]) -> list[str]:
    """Paths of ``wanted`` modules and all they depend on, dependencies first.

    ``modules_dep`` is the text of ``modules.dep`` (depmod(8)): ``path: path path``, each module's
    dependencies nearest first. Modules that the kernel has built in are not in it; asking for one that
    is in neither place is the caller's to notice, since only ``modules.builtin`` tells them apart.
    """
    dependencies: dict[str, tuple[str, list[str]]] = {}
    for line in modules_dep.splitlines():
        path, _, rest = line.partition(":")
        dependencies[_module_name(path)] = (path, rest.split())
    order: list[str] = []
    for name in wanted:
        if name not in dependencies:
            continue
        path, needs = dependencies[name]
        order += [needed for needed in [*reversed(needs), path] if needed not in order]
    return order


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def build(root: Path, release: str, wanted: Mapping[str, Iterable[str]], init: bytes) -> bytes:
    """The initrd for kernel ``release`` of the root filesystem at ``root``; ``init`` becomes ``/init``.

    It finds in ``/modules/NAME`` what to load, in order, for the modules that ``wanted`` has under that name; what two
    of them need is in the first.
    """
    modules = root / "lib/modules" / release
    dependencies = (modules / "modules.dep").read_text()
    asked = {name: list(some) for name, some in wanted.items()}
    every = [module for some in asked.values() for module in some]
    order = module_load_order(dependencies, every)
    built_in = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    missing = [
        name for name in every if name not in built_in and name not in {_module_name(path) for path in order}
    ]
    if missing:
        raise ProvisionError(
            f"kernel {release} has no module {', '.join(missing)}", "name another kernel in the recipe"
        )
    lists: dict[str, list[str]] = {}
    for name, some in asked.items():
        before = {path for listed in lists.values() for path in listed}
        lists[name] = [path for path in module_load_order(dependencies, some) if path not in before]
    return cpio(_entries(root, modules, lists, init))


def _entries(root: Path, modules: Path, lists: Mapping[str, list[str]], init: bytes) -> Iterator[Entry]:
    for name in ("bin", "dev", "modules"):
        yield directory(name)
    # Before devtmpfs is mounted, init's own output needs somewhere to go (console is 5,1).
    yield Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield file("bin/busybox", (root / "bin/busybox").read_bytes(), 0o755)
    yield file("init", init, 0o755)
    for name, order in lists.items():
        names = [f"{_module_name(path)}.ko" for path in order]
        for path, module in zip(order, names, strict=True):
            yield file(f"modules/{module}", decompressed(modules / path))
        yield file(f"modules/{name}", "".join(f"{module}\n" for module in names).encode())


def decompressed(module: Path) -> bytes:
    """The plain ELF of a module, whatever Debian compressed it with (busybox insmod wants it plain)."""
    content = module.read_bytes()
    match module.suffix:
        case ".xz":
            return lzma.decompress(content)
        case ".gz":
            return gzip.decompress(content)
        case ".ko":
            return content
    raise ProvisionError(f"cannot read {module.name}", "name another kernel in the recipe")
