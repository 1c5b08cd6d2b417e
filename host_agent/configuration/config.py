"""What the user asked of an instance, kept across starts, and whether this host can give it.

The law: a number that the host cannot honour is refused before anything starts, with what it can do;
a disk never shrinks, since that would lose what is on it. The file is the user's: what is changed through
agentctl is changed in it, and nothing else (``edit``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from host_agent import mounts, sizes
from host_agent.configuration import keys as config_keys
from host_agent.configuration import machine as config_machine
from host_agent.configuration import text as config_text
from host_agent.configuration.before_yaml import from_old
from host_agent.configuration.edit import Change, changed
from host_agent.configuration.keys import ACCELERATORS, GIB, MIB, MIN_MEMORY, Host, InstanceConfig, Key
from host_agent.configuration.kinds import Invalid, ListOf
from host_agent.configuration.template import template
from host_agent.configuration.text import Document, InvalidText
from host_agent.errors import ExitCode, UserError
from host_agent.files import parse_json, write_atomically
from host_agent.guest_settings import NO_DOCKER
from host_agent.paths import Home, InstancePaths
from host_agent.rules import check_settings
from protocol.api import MountSpec, PortSettings
from provision.recipe import CONTAINERD, DOCKER

__all__ = ["ACCELERATORS", "GIB", "MIB", "MIN_MEMORY", "Host", "InstanceConfig", "Wishes", "load", "save"]

#: An ext4 with Docker's own folders and one ordinary image.
MIN_DISK = 2 * GIB

#: The largest file that ext4 on the host can hold is 16 TiB less one block (ext4(5)).
MAX_DISK = 15 << 40

#: How long a command waits for another one that changes the file, which takes milliseconds, seconds.
LOCK_PATIENCE = 20.0

#: The same of a host agent, which does nothing else meanwhile.
AGENT_PATIENCE = 0.25

EDIT_HINT = "correct it: agentctl config edit"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the flags of one ``up`` ask for, by the configuration's fields; None keeps what is configured."""

    cpus: int | None = None
    memory: int | None = None
    disk: int | None = None
    accelerator: str | None = None
    mounts: tuple[MountSpec, ...] | None = None
    bulk: bool | None = None
    lan: bool | None = None
    privileged_offset: int | None = None

    def applied(self, config: InstanceConfig) -> InstanceConfig:
        asked = {wish.name: getattr(self, wish.name) for wish in fields(self)}
        return replace(config, **{name: value for name, value in asked.items() if value is not None})


# --- the file --------------------------------------------------------------------------------------


def load(paths: InstancePaths, host: Host) -> InstanceConfig:
    """The configuration of the instance, or what a new one has where there is none yet.

    Raises ``UserError`` for a file that is not a configuration: guessing could lose what was asked for.
    """
    attached = paths.attached.exists()
    for path in (paths.config, *(() if attached else (paths.old_config, paths.home.template))):
        if (content := _content(path)) is None:
            continue
        if path == paths.old_config:
            return _load_old(path, content)
        config = understood(path, content, host)
        return config if path == paths.home.template else config_machine.completed(paths.machine, config)
    default = InstanceConfig.default(host)
    # A machine that is attached sees no folder unless somebody says so.
    return config_machine.completed(paths.machine, replace(default, mounts=()) if attached else default)


def _content(path: Path) -> bytes | None:
    """None where there is no file. Raises ``UserError`` for one that cannot be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", f"see: ls -ld {path}", ExitCode.USAGE
        ) from None


def understood(path: Path, content: bytes, host: Host) -> InstanceConfig:
    """The configuration that ``content`` is, with an identity of its own. Raises ``UserError`` for what is none."""
    found = examined(content, host)
    if isinstance(found, InstanceConfig):
        return found
    more = f" (and {len(found) - 1} more: agentctl config validate)" if len(found) > 1 else ""
    raise UserError(f"{path}{found[0]}{more}", EDIT_HINT, ExitCode.USAGE)


@dataclass(frozen=True, slots=True)
class Mistake:
    """In a configuration: a sentence, and the line it is about, or 0."""

    line: int
    sentence: str

    def __str__(self) -> str:
        """What comes behind the name of the file."""
        return f" line {self.line}: {self.sentence}" if self.line else f": {self.sentence}"


def examined(content: bytes, host: Host) -> InstanceConfig | list[Mistake]:
    """The configuration that ``content`` is, or all that is wrong with it."""
    try:
        text = config_text.decode(content)
        document = config_text.parse(text)
    except InvalidText as error:
        return [Mistake(error.line, str(error))]
    reading = config_keys.read(document.values)
    errors = [*reading.errors]
    config = replace(InstanceConfig.default(host), **reading.values)
    if not errors:
        errors += _contradictions(config)
    return sorted({_mistake(error, document) for error in errors}, key=lambda one: one.line) or config


def _mistake(error: Invalid, document: Document) -> Mistake:
    return Mistake(document.line(error.path), str(error))


def _contradictions(config: InstanceConfig) -> list[Invalid]:
    """Between keys."""
    try:
        check_sockets(config)
    except UserError as error:
        return [Invalid.inside(("sockets",), (), error.message)]
    if config.runtime != DOCKER and config.docker != NO_DOCKER:
        return [Invalid(("docker",), f"has settings of dockerd, and the runtime is {config.runtime}")]
    if config.runtime == CONTAINERD and config.docker_sock:
        return [Invalid(("docker_sock",), "leads to Docker's interface, which containerd does not have")]
    return []


def save(paths: InstancePaths, config: InstanceConfig) -> None:
    """Make the file say ``config``, and leave all else in it as it is. Raises ``OSError``, and ``UserError`` for a
    file that is not understood."""
    update(paths, lambda: config)


def update(paths: InstancePaths, ask: Callable[[], InstanceConfig]) -> InstanceConfig:
    """``save`` what ``ask`` makes of the file, which nobody changes meanwhile."""
    with locked(paths.config_lock):
        config = ask()
        _save(paths, config)
    return config


@contextlib.contextmanager
def locked(lock: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """For the moment in which the file is changed: an agent and a command may both want to.

    Raises ``UserError`` if somebody else has it for longer than ``patience``, seconds: a command that was stopped
    (^Z), or one that waits for a disk.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + patience
        while not _is_ours(descriptor):
            if time.monotonic() > deadline:
                raise UserError(
                    f"another command is changing what {lock} is for",
                    "try again when it is done",
                    ExitCode.BUSY,
                )
            time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def _is_ours(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _save(paths: InstancePaths, config: InstanceConfig) -> None:
    text = current_text(paths, config)
    write(paths, with_values(paths.config, text, config, Host.measure()), config)


def write(paths: InstancePaths, text: str, config: InstanceConfig) -> None:
    """Replace the file by ``text``, which says ``config``. The lock is held. Raises ``OSError``."""
    # First: an identity without a file is one that nothing has yet, a file without its identity gets another.
    config_machine.save(paths.machine, config)
    write_text(paths.home, paths.config, text)
    with contextlib.suppress(FileNotFoundError):
        # Taken over; kept for whoever goes back to an older agentctl.
        paths.old_config.replace(paths.old_config.with_suffix(".json.old"))


def write_text(home: Home, path: Path, text: str) -> None:
    """Replace ``path``, which may be a symlink, for instance into somebody's dotfiles. Raises ``OSError``."""
    content = text.encode()
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        save_schema(home)
    write_atomically(Path(os.path.realpath(path)), content, inherit=True)


def save_schema(home: Home) -> None:
    """For editors. A full disk does not matter to anything else."""
    content = json.dumps(config_keys.schema(), indent=1).encode() + b"\n"
    with contextlib.suppress(OSError):
        if not home.config_schema.exists() or home.config_schema.read_bytes() != content:
            write_atomically(home.config_schema, content)


def current_text(paths: InstancePaths, config: InstanceConfig) -> str:
    """The text of the file or, where there is none, what it begins as: ``config``, unless the user has a template."""
    attached = paths.attached.exists()
    sources = [paths.config] if attached or paths.old_config.exists() else [paths.config, paths.home.template]
    for path in sources:
        if (text := text_of(path)) is not None:
            return text
    return template(config, paths.home.config_schema, attached=attached)


def text_of(path: Path) -> str | None:
    """None where there is no file. Raises ``UserError`` for one that is no text."""
    if (content := _content(path)) is None:
        return None
    try:
        return config_text.decode(content)
    except InvalidText as error:
        raise UserError(f"{path}: {error}", EDIT_HINT, ExitCode.USAGE) from None


def with_values(path: Path, text: str, config: InstanceConfig, host: Host) -> str:
    """``text`` as it says ``config``. Raises ``UserError`` if it cannot be made to."""
    before = understood(path, text.encode(), host)
    for name, key in config_keys.keys().items():
        value = getattr(config, name)
        if getattr(before, name) != value:
            try:
                text = changed(text, change_of(key, key.kind.plain(value)))
            except InvalidText as error:
                raise _unchangeable(path, f": {error}") from None
    require_same(path, text, config, host)
    return text


def change_of(key: Key, value: Any, inside: config_text.Path = ()) -> Change:
    """The change of the text that gives ``key``, or what is at ``inside`` of it, a plain value."""
    element = key.kind.element if isinstance(key.kind, ListOf) else None

    def same(old: Any, new: Any) -> bool:
        try:
            return bool(element.read(old, ()) == element.read(new, ())) if element else bool(old == new)
        except Invalid:
            return False

    return Change((*map(str, key.path), *map(str, inside)), value, "" if inside else key.comment, same)


def require_same(path: Path, text: str, config: InstanceConfig, host: Host) -> None:
    """Raise ``UserError`` unless ``text`` says ``config``: with YAML's anchors, one change can be several."""
    after = examined(text.encode(), host)
    if isinstance(after, list):
        raise _unchangeable(path, str(after[0]))
    if config_keys.plain(after) != config_keys.plain(config):
        raise _unchangeable(path, " is written in a way that only its author can change")


def _unchangeable(path: Path, reason: str) -> UserError:
    return UserError(f"{path}{reason}", "edit it: agentctl config edit", ExitCode.USAGE)


def save_changes(paths: InstancePaths, running: InstanceConfig, **changes: Any) -> InstanceConfig:
    """Write ``changes`` of an instance that runs, and nothing else: people edit the file meanwhile, for its next start.

    Returns ``running`` with the changes. Raises ``OSError``, also for a file that is not understood just now, and
    ``UserError`` for what cannot be.
    """
    check_sockets(replace(running, **changes))
    try:
        with locked(paths.config_lock, AGENT_PATIENCE):
            there = paths.config.exists() or paths.old_config.exists()
            kept = load(paths, Host.measure()) if there else running
            _save(paths, replace(kept, **changes))
    except UserError as error:
        raise OSError(error.message) from None
    return replace(running, **changes)


def _load_old(path: Path, content: bytes) -> InstanceConfig:
    """Of before there was YAML."""
    try:
        return from_old(parse_json(content))
    except (ValueError, UserError) as error:
        raise UserError(
            f"{path} is damaged ({error})",
            f"correct it, or remove it to start from the defaults: rm {path}",
            ExitCode.USAGE,
        ) from error


# --- of an instance that runs ----------------------------------------------------------------------


def load_running(paths: InstancePaths, host: Host) -> tuple[InstanceConfig, str]:
    """``load`` for a host agent, which keeps what it has read: and, in a sentence, what is wrong with the file.

    People edit the file while the VM runs. That is checked by who starts it, and a slip there must not end a VM that
    is well when its agent is started again. Raises ``UserError`` only if nothing is kept.
    """
    try:
        config = load(paths, host)
    except UserError as error:
        if (running := load_kept(paths.running_config)) is None:
            raise
        return running, f"{error.message}; the VM goes on with what it was started with"
    from host_agent.process import ProcessIdentity  # which is of no use to `status`, and imports trio

    # A record of before a power cut is of nothing that runs.
    if ProcessIdentity.read(paths.qemu_identity) and (running := load_kept(paths.running_config)):
        config = _as_it_runs(config, running)
    with contextlib.suppress(OSError):  # a full disk
        save_kept(paths.running_config, config)
    return config, ""


def _as_it_runs(config: InstanceConfig, running: InstanceConfig) -> InstanceConfig:
    """``config`` with what has been edited since and waits for a restart, or for ``up``, as it was: neither is the VM
    another one because an agent died, nor must Docker be restarted for that, or a folder go that containers use."""
    waiting = [name for name, key in config_keys.keys().items() if key.restart]
    values = {name: getattr(running, name) for name in (*waiting, "disk")}
    specs = (*running.mounts, *mounts.compare(running.mounts, config.mounts).added)
    try:
        mounts.check(specs)
    except UserError:
        specs = running.mounts
    return replace(config, mounts=specs, **values).with_guest(running.guest)


def save_kept(path: Path, config: InstanceConfig) -> None:
    """What a host agent has read, whole, for the one that comes after it. Raises ``OSError``."""
    values = {**config_machine.record_of(config), "config": config_keys.plain(config)}
    write_atomically(path, json.dumps(values).encode() + b"\n")


def load_kept(path: Path) -> InstanceConfig | None:
    """What a host agent keeps of what it has read; None where none runs."""
    try:
        values = parse_json(path.read_bytes())
        if "config" not in values:
            return from_old(values)
        reading = config_keys.read(values["config"])
        if reading.errors:
            return None
        return config_machine.with_record(
            replace(InstanceConfig.default(Host.measure()), **reading.values), values
        )
    except (OSError, ValueError, UserError, TypeError, AttributeError, KeyError):
        return None


# --- what can be -----------------------------------------------------------------------------------
def check_sockets(config: InstanceConfig) -> None:
    """Raise ``UserError`` (USAGE) if a port and a socket of the VM are to be at one path of the host."""
    taken = {forward.host for forward in config.sockets if not forward.reverse}
    for rule in config.rules:
        if rule.host_socket in taken:
            raise UserError(
                f"a port and a socket of the VM cannot both be at {rule.host_socket}",
                "see: agentctl forward list",
                ExitCode.USAGE,
            )


def check_ports(settings: PortSettings) -> None:
    """Raise ``UserError`` (USAGE) for rules, or an offset, that cannot be."""
    try:
        check_settings(settings)
    except ValueError as error:
        raise UserError(
            str(error), "see: agentctl forward add --help, agentctl up --help", ExitCode.USAGE
        ) from None


def check(config: InstanceConfig, host: Host) -> None:
    """Raise ``UserError`` if this host cannot run ``config``."""
    if config.cpus < 1:
        raise _refused(f"a VM needs at least 1 cpu; asked for {config.cpus}", f"--cpus 1 to {host.cpus}")
    if config.cpus > host.cpus:
        raise _refused(
            f"this machine has {host.cpus} cpus; asked for {config.cpus}", f"--cpus 1 to {host.cpus}"
        )
    memory_hint = f"--memory {sizes.flag(MIN_MEMORY)} to {host.most_memory // MIB}MiB"
    if config.memory < MIN_MEMORY:
        raise _refused(
            f"a VM needs at least {sizes.show(MIN_MEMORY)} of memory; asked for {sizes.show(config.memory)}",
            memory_hint,
        )
    if config.memory > host.most_memory:
        raise _refused(
            f"this machine has {sizes.show(host.memory)} of memory and needs some itself;"
            f" asked for {sizes.show(config.memory)}",
            memory_hint,
        )
    if config.disk < MIN_DISK:
        raise _refused(
            f"the disk needs at least {sizes.show(MIN_DISK)}; asked for {sizes.show(config.disk)}",
            f"--disk {sizes.flag(MIN_DISK)} or more",
        )
    if config.disk > MAX_DISK:
        raise _refused(
            f"the disk can have {sizes.show(MAX_DISK)}; asked for {sizes.show(config.disk)}",
            f"--disk {sizes.flag(MIN_DISK)} to {sizes.flag(MAX_DISK)}; it can grow later",
        )
    if config.accelerator not in ACCELERATORS:
        raise _refused(f"{config.accelerator!r} is not an accelerator", f"one of {', '.join(ACCELERATORS)}")


def with_kept_disk(config: InstanceConfig, wishes: Wishes, data_disk: Path) -> InstanceConfig:
    """``config`` with the size of a disk that a deleted instance left, unless a size was asked for."""
    if wishes.disk is not None or not data_disk.exists():
        return config
    return replace(config, disk=max(config.disk, data_disk.stat().st_size))


def check_growth(config: InstanceConfig, data_disk: Path) -> None:
    """Raise ``UserError`` if ``data_disk`` exists and is larger than what is asked for."""
    if data_disk.exists():
        size = data_disk.stat().st_size
        if config.disk < size:
            raise _refused(
                f"the disk has {sizes.show(size)} and never shrinks; asked for {sizes.show(config.disk)}",
                f"--disk {sizes.flag(size)} or more, or start afresh: agentctl delete --data",
            )


def check_disk(config: InstanceConfig, data_disk: Path) -> None:
    """Raise ``UserError`` if ``data_disk`` is larger than what is asked for, or cannot be made."""
    check_growth(config, data_disk)
    free = shutil.disk_usage(data_disk.parent).free
    if free < GIB:
        raise _refused(
            f"{sizes.show(free)} are free where {data_disk} is; a VM needs at least 1 GiB to start",
            "free some space, or set AGENTCTL_HOME to a folder on a larger disk",
        )


def _refused(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.RESOURCES)
