"""The guest agent as one file that any Python 3.11 runs: ours and what it imports, pure Python, as a zipapp.

The law: equal sources make equal bytes, and nothing is in it that depends on this machine. A module is in
it because another one imports it, so the host's packages decide the versions, and tests and tools of theirs
stay at home. Compiled modules do too: who imports one has a fallback (msgpack).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import secrets
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home
from host_agent.remote import launcher
from provision import bundle

#: What the agent imports of others. pyroute2 as a whole is 5 MB: this one module is imported by its name and
#: past the package's own ``__init__`` (guest_agent/sockdiag.py), which therefore is an empty one here.
_ROOTS: Final = ("trio", "msgpack", "pyroute2.netlink.diag")
_EMPTY: Final = frozenset({"pyroute2/__init__.py"})
#: These, and what they are made of; whatever else is imported is for other versions of Python, or for typing.
_PACKAGES: Final = frozenset(
    {"attr", "attrs", "idna", "msgpack", "outcome", "pyroute2", "sniffio", "sortedcontainers", "trio"}
)
#: Of other systems.
_ELSEWHERE: Final = ("windows", "kqueue")

#: The oldest time that a zip can say.
_NO_TIME: Final = (1980, 1, 1, 0, 0, 0)

_PLACEHOLDER: Final = b'\nCONTENT = ""\n'


@dataclass(frozen=True, slots=True)
class Payload:
    """The archive, and the sha256 of its bytes in hex."""

    data: bytes
    digest: str


@functools.cache
def build() -> Payload:
    """The archive for this checkout, as it was kept in the user's cache or made. Making it takes a second of trio's
    thread, or several where much is going on.

    Raises ``UserError`` if a package that the agent needs is not installed as files.
    """
    folder = Home.find().cache
    root = Path(bundle.__file__).parent.parent
    place = hashlib.sha256(f"{root}\0{sys.prefix}".encode(errors="surrogateescape")).hexdigest()[:8]
    kept = folder / f"agent-{place}.pyz"
    ours = [*bundle.sources(root), Path(__file__), Path(launcher.__file__)]
    with contextlib.suppress(OSError, ValueError):
        return _unchanged(kept.read_bytes(), ours)
    sources = _sources(root)
    # Before they are read: what is changed meanwhile is looked at again next time.
    seen = _stamps([*ours, *sources.values()])
    made = pack({name: b"" if name in _EMPTY else path.read_bytes() for name, path in sources.items()})
    if folder.is_dir():
        with contextlib.suppress(OSError):
            _keep(kept, json.dumps({"sources": seen, "digest": made.digest}).encode() + b"\n" + made.data)
    return made


def _unchanged(kept: bytes, ours: list[Path]) -> Payload:
    """The archive in ``kept``. Raises ``OSError`` or ``ValueError`` if that is not what would be made now."""
    head, _, data = kept.partition(b"\n")
    said = json.loads(head)
    digest = hashlib.sha256(data).hexdigest()
    seen = said.get("sources") if isinstance(said, dict) and said.get("digest") == digest else None
    if not isinstance(seen, dict) or not {str(path) for path in ours} <= seen.keys():
        raise ValueError("another archive, or half of one")
    if _stamps([Path(path) for path in seen]) != seen:
        raise ValueError("a source has changed")
    return Payload(data, digest)


def _stamps(paths: list[Path]) -> dict[str, list[int]]:
    """Size and time of change (ns) of each."""
    found = {path: path.stat() for path in paths}
    return {str(path): [status.st_size, status.st_mtime_ns] for path, status in found.items()}


def _keep(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        new.write_bytes(content)
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)


def pack(files: dict[str, bytes]) -> Payload:
    """An archive of ``files`` (name to content) and the launcher."""
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name}\0{len(content)}\0".encode())
        whole.update(content)
    source = Path(launcher.__file__).read_bytes()
    assert source.count(_PLACEHOLDER) == 1
    main = source.replace(_PLACEHOLDER, b'\nCONTENT = "%s"\n' % whole.hexdigest()[:16].encode())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in [("__main__.py", main), *sorted(files.items())]:
            info = zipfile.ZipInfo(name, _NO_TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o600 << 16
            archive.writestr(info, content)
    data = buffer.getvalue()
    return Payload(data, hashlib.sha256(data).hexdigest())


def _sources(root: Path) -> dict[str, Path]:
    """Every module of the archive but the launcher: its path in there, and its source here."""
    files = {path.relative_to(root).as_posix(): path for path in bundle.sources(root)}
    wanted = list(_ROOTS)
    seen: set[str] = set()
    while wanted:
        module = wanted.pop()
        if module in seen or module.partition(".")[0] not in _PACKAGES or module.endswith(_ELSEWHERE):
            continue
        seen.add(module)
        if "." in module:
            wanted.append(module.rpartition(".")[0])
        if (path := _file_of(module)) is None:
            continue
        is_package = path.name == "__init__.py"
        name = module.replace(".", "/") + ("/__init__.py" if is_package else ".py")
        files[name] = path
        if name not in _EMPTY:
            wanted += _imports(path.read_bytes(), module, is_package)
    for needed in ("trio/__init__.py", "msgpack/fallback.py", "pyroute2/netlink/diag/__init__.py"):
        if needed not in files:
            raise UserError(
                f"the Python package {needed.partition('/')[0]} is not installed as files that can be sent",
                "install agentctl again, by ./provision/quickstart or pip",
                ExitCode.DEPENDENCY,
            )
    return files


@functools.cache
def _file_of(module: str) -> Path | None:
    """The source of a module, found without running anything of it."""
    parent, _, name = module.rpartition(".")
    if not parent:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        found = Path(spec.origin) if spec is not None and spec.origin else None
        return found if found is not None and found.suffix == ".py" and found.is_file() else None
    package = _file_of(parent)
    if package is None or package.name != "__init__.py":
        return None
    paths = (package.parent / name / "__init__.py", package.parent / f"{name}.py")
    return next((path for path in paths if path.is_file()), None)


def _imports(source: bytes, module: str, is_package: bool) -> Iterator[str]:
    """The modules that ``source`` may import when it runs; some of them are only names in a module."""
    package = module if is_package else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                parts = package.split(".") if level else []
                above = parts[: len(parts) - level + 1]
                full = ".".join([*above, *([base] if base else [])])
                yield full
                yield from (f"{full}.{name.name}" for name in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=other):
                pending += other
            case ast.If(
                test=ast.BoolOp(op=ast.Or(), values=[ast.Name(id="TYPE_CHECKING"), *_]), orelse=other
            ):
                pending += other
            case ast.stmt() | ast.Module() | ast.ExceptHandler() | ast.match_case():
                pending += ast.iter_child_nodes(node)
