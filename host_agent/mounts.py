"""Which folders of the host the VM sees, and where: the rules of the list (``--mount``'s words: ``mount_words``).

The laws: a mount hides nothing that the VM itself needs, and no two are at the same place; what a user chose
is not widened without being said. A path of the guest is compared as it is written, a path of the host by
where it really is, since the guest does not have the host's symlinks. Where that is, is found when a folder is
chosen, and kept: of a folder inside another mount, a guest can make a symlink to anywhere. The list keeps the
order in which its mounts came, which is what makes their numbers lasting. Whatever asks this machine is at
the end.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from host_agent.errors import ExitCode, UserError
from host_agent.mount_words import Words, parse
from protocol.api import MountSpec

Resolve = Callable[[str], str]

#: Each has a FUSE connection, a descriptor in systemd's store (which takes 64) and a row in a table.
MAX_MOUNTS = 32

#: Bytes of a path: with all else that is in them, MAX_MOUNTS rows stay within one frame (256 KiB).
MAX_PATH = 1024

NONE = "none"

#: Of the VM, with everything below: what it runs on, what Docker keeps, what the kernel shows.
_WHOLLY_ITS_OWN = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin"),
    *("/sys", "/usr", "/var/lib/agentctl", "/var/lib/containerd", "/var/lib/docker", "/var/lib/dpkg"),
    *("/var/lib/systemd", "/var/lock", "/var/run"),
)

#: Of the VM only as they are: there is room below for folders of the host.
_ITSELF_ITS_OWN = ("/home", "/tmp", "/var/cache", "/var/log", "/var/tmp")

#: Below these there is room again: people build there, and removable disks are mounted there.
_ROOM_BELOW = ("/run/media", "/usr/local", "/usr/src")

_GUEST_HOME = re.compile(r"/home/[^/]+\.guest")

#: Not files but the kernel. The memory of the very process that serves them is one of these.
_OF_THE_KERNEL = ("/dev", "/proc", "/sys")


# --- rules -----------------------------------------------------------------------------------------


def check(specs: Sequence[MountSpec]) -> None:
    """Raise ``UserError`` (USAGE) unless these can all be mounted beside each other."""
    if len(specs) > MAX_MOUNTS:
        raise _refused(
            f"{len(specs)} folders are too many to mount", f"at most {MAX_MOUNTS}; mount outer ones"
        )
    taken: dict[str, MountSpec] = {}
    for spec in specs:
        _check_path(spec.host_path)
        _check_path(spec.guest_path)
        if spec.real_path:
            _check_path(spec.real_path)
        if its_own := _kept_for_the_vm(spec.guest_path):
            raise _refused(
                f"{spec.guest_path} cannot be a mount: {its_own} is the VM's own",
                f"choose another place: --mount {spec.host_path}:/mnt/{os.path.basename(spec.host_path)}",
            )
        if other := taken.get(spec.guest_path):
            raise _refused(
                f"{spec.host_path} and {other.host_path} cannot both be {spec.guest_path} in the VM",
                "leave one out, or choose another place for it: --mount PATH:GUESTPATH",
            )
        taken[spec.guest_path] = spec


def _check_path(path: str) -> None:
    if not path.startswith("/") or path != normal(path) or ".." in path.split("/"):
        raise _refused(f"{path!r} is not a plain absolute path", "leave out .. and doubled slashes")
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        raise _refused(
            f"{os.fsencode(path)!r} is not UTF-8 and cannot be mounted itself",
            "mount the folder that it is in",
        ) from None
    if length > MAX_PATH or "\0" in path:
        raise _refused(f"{path[:80]!r}... is too long ({length} bytes; {MAX_PATH} is the most)", "move it")


def _kept_for_the_vm(path: str) -> str | None:
    """The folder of the VM's own that a mount at ``path`` would hide, if there is one."""
    if any(path != free and is_below(path, free) for free in _ROOM_BELOW):
        return None
    if path in _ITSELF_ITS_OWN or _GUEST_HOME.fullmatch(path):
        return path
    for own in _WHOLLY_ITS_OWN:
        if is_below(path, own):
            return own
        if is_below(own, path):
            return path
    return None


def is_below(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or in it; both are absolute and normal."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def normal(path: str) -> str:
    """``path`` without doubled slashes, dots, and a slash at its end."""
    return "/" + os.path.normpath(path).lstrip("/") if path.startswith("/") else os.path.normpath(path)


def parents_first(specs: Iterable[MountSpec]) -> list[MountSpec]:
    """In the order in which they can be mounted."""
    return sorted(specs, key=lambda spec: spec.guest_path.split("/"))


def numbers(specs: Sequence[MountSpec]) -> dict[str, int]:
    """The number of each guest path: its CRC-32, or the next that is free. 0 is nobody's.

    The earlier of two that collide has it, so a list that only grows keeps its numbers.
    """
    given: dict[str, int] = {}
    taken = {0}
    for spec in specs:
        number = zlib.crc32(spec.guest_path.encode())
        while number in taken:
            number = (number + 1) & 0xFFFFFFFF
        taken.add(number)
        given[spec.guest_path] = number
    return given


@dataclass(frozen=True, slots=True)
class Change:
    """From one list to another: what can be mounted at once, and the paths that only a restart changes."""

    added: tuple[MountSpec, ...]
    later: tuple[str, ...]


def compare(current: Iterable[MountSpec], wanted: Iterable[MountSpec]) -> Change:
    """Containers may be using what is mounted, so nothing is taken away from or changed under them."""
    before = {spec.guest_path: spec for spec in current}
    after = {spec.guest_path: spec for spec in wanted}
    added = tuple(spec for path, spec in after.items() if path not in before)
    later = sorted(path for path, spec in before.items() if not _is_same(spec, after.get(path)))
    return Change(added, tuple(later))


def _is_same(current: MountSpec, wanted: MountSpec | None) -> bool:
    """A path of the host that has come to mean another folder since is another one, if that is known of both."""
    if wanted is None or current != wanted:
        return False
    return not (current.real_path and wanted.real_path) or current.real_path == wanted.real_path


# --- where a path is -------------------------------------------------------------------------------


def holder(specs: Iterable[MountSpec], guest_path: str) -> MountSpec | None:
    """The mount that ``guest_path`` of the guest is in: the innermost."""
    holding = [spec for spec in specs if is_below(guest_path, spec.guest_path)]
    return max(holding, key=lambda spec: len(spec.guest_path), default=None)


def is_shared(specs: Iterable[MountSpec], guest_path: str) -> bool:
    """Whether the guest sees a folder of the host at ``guest_path``, and not its own."""
    return holder(specs, guest_path) is not None


def share_of(
    specs: Sequence[MountSpec], host_path: str, resolve: Resolve = os.path.realpath
) -> MountSpec | None:
    """The mount through which the guest sees ``host_path`` of the host."""
    found = _visible(specs, host_path, resolve)
    return found and found[0]


def guest_path_of(
    specs: Sequence[MountSpec], host_path: str, resolve: Resolve = os.path.realpath
) -> str | None:
    """Where the guest sees ``host_path`` of the host, however many symlinks of the host lead to it."""
    found = _visible(specs, host_path, resolve)
    return found and found[1]


def _visible(specs: Sequence[MountSpec], host_path: str, resolve: Resolve) -> tuple[MountSpec, str] | None:
    real = resolve(host_path)
    roots = [(spec.real_path or resolve(spec.host_path), spec) for spec in specs]
    for root, spec in sorted(roots, key=lambda pair: len(pair[0]), reverse=True):
        if is_below(real, root):
            guest_path = normal(f"{spec.guest_path}/{real.removeprefix(root)}")
            # Another mount may be in the way there.
            if holder(specs, guest_path) is spec:
                return spec, guest_path
    return None


# --- this machine ----------------------------------------------------------------------------------


def default() -> tuple[MountSpec, ...]:
    """The user's home, at the same path; nothing for a user whose home cannot be one in the VM (``/``)."""
    home = normal(os.path.expanduser("~"))
    specs = resolved([MountSpec(home, home)])
    try:
        check(specs)
    except UserError:
        return ()
    return specs


def resolved(specs: Iterable[MountSpec]) -> tuple[MountSpec, ...]:
    """Those of which it is not known yet where they really are (of an older agentctl) are where they are now."""
    return tuple(
        spec if spec.real_path else replace(spec, real_path=os.path.realpath(spec.host_path))
        for spec in specs
    )


def strayed(specs: Sequence[MountSpec]) -> dict[str, str]:
    """By guest path, what paths of the host mean now that is not what is mounted. May wait for a disk."""
    now = {spec.guest_path: os.path.realpath(spec.host_path) for spec in specs}
    return {
        spec.guest_path: now[spec.guest_path]
        for spec in specs
        if spec.real_path not in ("", now[spec.guest_path]) and os.path.exists(now[spec.guest_path])
    }


def here() -> str | None:
    """The working directory, by the name that the shell has for it; None if it was deleted."""
    try:
        real = os.getcwd()
    except FileNotFoundError:
        return None
    named = os.environ.get("PWD", "")
    with suppress(OSError):
        if named == normal(named) and named.startswith("/") and os.path.samefile(named, real):
            return named
    return real


def chosen(texts: Sequence[str], private: Path) -> tuple[MountSpec, ...]:
    """The list that ``--mount`` words ask for; the word ``none`` alone is an empty one.

    ``private`` is agentctl's own folder. Raises ``UserError`` (USAGE) for what is not there or not allowed.
    """
    if list(texts) == [NONE]:
        return ()
    asked = [_Asked.of(text) for text in texts]
    for folder in asked:
        _require_folder(folder.host_path, folder.real_path, private)
    placed: dict[int, MountSpec] = {}
    # Those whose place is certain first: where the others are depends on what is around them.
    for number in sorted(range(len(asked)), key=lambda number: asked[number].is_uncertain):
        placed[number] = asked[number].placed(list(placed.values()))
    specs = tuple(dict.fromkeys(placed[number] for number in sorted(placed)))
    check(specs)
    return specs


@dataclass(frozen=True, slots=True)
class _Asked:
    """Words, and the folder of this machine that they mean."""

    words: Words
    host_path: str
    real_path: str

    @classmethod
    def of(cls, text: str) -> _Asked:
        words = parse(text)
        host_path = _absolute(words.host_path)
        return cls(words, host_path, os.path.realpath(host_path))

    @property
    def is_uncertain(self) -> bool:
        return not self.words.guest_path and self.real_path != self.host_path

    def placed(self, others: Sequence[MountSpec]) -> MountSpec:
        words = self.words
        wanted = words.guest_path
        guest_path = normal(wanted) if wanted else _place(self.host_path, self.real_path, others)
        return MountSpec(self.host_path, guest_path, words.read_only, words.host_locks, self.real_path)


def _place(host_path: str, real: str, others: Sequence[MountSpec]) -> str:
    """The same path in the guest; but where it leads through a symlink inside another mount, its real one.

    The guest's kernel follows that symlink, so both names are right there. A symlink outside of all mounts
    (``/home`` of some systems) is not in the guest, and what is behind it keeps the name that people use.
    """
    if real == host_path or not any(is_below(host_path, other.guest_path) for other in others):
        return host_path
    return guest_path_of(others, real) or real


@dataclass(frozen=True, slots=True)
class WithDirectory:
    """A list that has the working directory in it, if it can be. ``note`` and ``warning`` are sentences."""

    specs: tuple[MountSpec, ...]
    note: str = ""
    warning: str = ""


def with_directory(specs: tuple[MountSpec, ...], directory: str | None, private: Path) -> WithDirectory:
    """Add ``directory`` to ``specs`` if it is outside of all of them.

    Not if its name is inside of one and a symlink leads out: the VM can make such symlinks, and would be given
    whatever they mean.
    """
    if directory is None or share_of(specs, directory):
        return WithDirectory(specs)
    real = os.path.realpath(directory)
    if any(is_below(directory, spec.host_path) for spec in specs):
        warning = f"the VM does not see this folder: a symlink leads from a shared one to {real}"
        return WithDirectory(specs, warning=f"{warning}; cd there to share it, too")
    try:
        _require_folder(directory, real, private)
        more = (*specs, MountSpec(directory, _place(directory, real, specs), real_path=real))
        check(more)
    except UserError as error:
        return WithDirectory(specs, warning=f"the VM does not see this folder: {error.message}")
    return WithDirectory(more, note=f"the VM gets to see this folder, too: {directory}")


def _absolute(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise _refused(f"there is no user {expanded.split('/')[0][1:]!r}", "write the path of the folder")
    joined = os.path.join(here() or "/", expanded)
    # What .. means behind a symlink, only the filesystem knows.
    return os.path.realpath(joined) if ".." in joined.split("/") else normal(joined)


def _require_folder(path: str, real: str, private: Path) -> None:
    """Raise ``UserError`` (USAGE) unless ``path``, which means ``real``, is a folder of this user that a VM may see."""
    if real == "/" or any(is_below(real, kernel) for kernel in _OF_THE_KERNEL):
        raise _refused(
            f"{path} cannot be mounted: it is this machine itself", "mount the folders that are needed"
        )
    if is_below(real, os.path.realpath(private)):
        raise _refused(f"{path} cannot be mounted: it is in agentctl's own folder", "mount another folder")
    try:
        is_folder = stat.S_ISDIR(os.stat(real).st_mode)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise _refused(f"{path} does not exist", f"make it first: mkdir -p {path}") from None
        raise _refused(f"{path} cannot be mounted: {error.strerror}", "see: ls -ld " + path) from None
    if not is_folder:
        raise _refused(f"{path} is not a folder", f"mount the folder that it is in: {os.path.dirname(path)}")
    if not os.access(real, os.R_OK | os.X_OK):
        raise _refused(f"{path} cannot be mounted: you may not read it", f"see: ls -ld {path}")


def _refused(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.USAGE)
