"""The recipe of the guest image, and the hash that names what it makes.

The law: two recipes that could make different images never share a name. The hash covers
``recipe.toml``, every file under ``guest/`` with its mode, the architecture, the runtime, and the
builder's own sources, since they too decide what the image contains.
"""

from __future__ import annotations

import hashlib
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path

from provision.errors import ProvisionError

DOCKER = "docker"
CONTAINERD = "containerd"
RUNTIMES = (DOCKER, "podman", CONTAINERD)
"""What may run the containers."""

HERE = Path(__file__).parent
_BUILDER_SOURCES = ("bootstrap.py", "commands.py", "image.py", "initrd.py", "manifest.py", "recipe.py")
_DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to build. ``root_size`` is in bytes; ``digest`` is 16 hex digits."""

    suite: str
    mirror: str
    security_mirror: str
    architecture: str
    kernel_package: str
    packages: tuple[str, ...]
    alone_modules: tuple[str, ...]
    initrd_modules: tuple[str, ...]
    bulk_modules: tuple[str, ...]
    cmdline: tuple[str, ...]
    root_size: int
    guest_files: Path
    digest: str


def debian_architecture(machine: str = "") -> str:
    """Debian's name of this machine's architecture (or of ``machine``, as ``uname -m`` says it)."""
    machine = machine or platform.machine()
    try:
        return _DEBIAN_ARCHITECTURES[machine]
    except KeyError:
        raise ProvisionError(
            f"there is no guest image for {machine} machines", "use an x86_64 or an ARM64 machine"
        ) from None


def load(directory: Path = HERE, machine: str = "", runtime: str = DOCKER) -> Recipe:
    """Read ``directory/recipe.toml``, for an image of ``runtime``; raises ``ProvisionError`` if it is not a recipe."""
    architecture = debian_architecture(machine)
    path = directory / "recipe.toml"
    try:
        text = path.read_bytes()
        table = tomllib.loads(text.decode())
        return Recipe(
            suite=table["suite"],
            mirror=table["mirror"],
            security_mirror=table["security_mirror"],
            architecture=architecture,
            kernel_package=table["kernel"][architecture],
            packages=(*table["packages"], *table["runtime"][runtime]),
            alone_modules=tuple(table["alone_modules"]),
            initrd_modules=tuple(table["initrd_modules"]),
            bulk_modules=tuple(table["bulk_modules"][architecture]),
            cmdline=tuple(table["cmdline"]),
            root_size=int(table["root_size"]),
            guest_files=directory / "guest",
            digest=_digest(directory, text, architecture, runtime),
        )
    except OSError as error:
        raise ProvisionError(
            f"cannot read {error.filename}: {error.strerror}", "reinstall agentctl"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ProvisionError(f"{path} is not a recipe: {error!r}", "reinstall agentctl") from error


def _digest(directory: Path, recipe: bytes, architecture: str, runtime: str) -> str:
    digest = hashlib.sha256()

    def add(name: str, mode: int, content: bytes) -> None:
        # Lengths first, so that no two different inputs make the same stream.
        header = f"{name}\0{mode:o}\0{len(content)}\0"
        digest.update(header.encode())
        digest.update(content)

    add("architecture", 0, architecture.encode())
    add("runtime", 0, runtime.encode())
    add("recipe.toml", 0, recipe)
    for source in _BUILDER_SOURCES:
        add(source, 0, (HERE / source).read_bytes())
    for path in sorted((directory / "guest").rglob("*")):
        if path.is_file():
            # Of the mode only what a checkout keeps: whether it can be executed.
            add(str(path.relative_to(directory)), path.stat().st_mode & 0o100, path.read_bytes())
    return digest.hexdigest()[:16]
