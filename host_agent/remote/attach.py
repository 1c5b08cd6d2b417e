"""``agentctl attach``: from an address to an instance that runs, with progress on the way; and once more, by its name.

The laws: the first connection is made here, where there is somebody who can be asked; what they answer goes on in
memory only. Nothing is written down of a machine that could not be reached, and what fails leaves nothing running, here
or there.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

from host_agent import ending, groups, port_rules, rule_text, socket_rules, starting, state
from host_agent.client import RESTART_TIME, connected
from host_agent.configuration import config as configuration
from host_agent.configuration.config import Host, InstanceConfig
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths, check_name
from host_agent.remote import answers, folders, record
from host_agent.remote.daemon import Install, Installed, OpenWay
from host_agent.remote.machine import Address
from host_agent.remote.prompts import Asked
from host_agent.remote.record import Attached
from host_agent.remote.session import session_name
from host_agent.starting import Progress, UpResult
from protocol.api import (
    AddMounts,
    ChangePorts,
    ChangeSocketForwards,
    GetMounts,
    GetPortSettings,
    GetSocketForwards,
    GetStatus,
    InstanceStatus,
    LinkState,
    Mounts,
    MountSpec,
    MountState,
    PortRule,
    SocketForward,
)
from protocol.errors import RemoteFailure

T = TypeVar("T")

#: How long it is before a command that waits for another one looks again, seconds.
_INTERVAL = 0.2


@dataclass(frozen=True, slots=True)
class Wishes:
    """What one ``attach`` asks for: words of ``--mount`` and of ``--forward``. ``keep`` None: as before."""

    mounts: tuple[str, ...] = ()
    forwards: tuple[str, ...] = ()
    keep: bool | None = None

    def rules(self) -> list[PortRule]:
        """Raises ``UserError`` (USAGE)."""
        words = [word for word in self.forwards if ":/" not in word]
        return [rule_text.from_words(word, guest_ip=None, ignore=False, static=False) for word in words]

    def sockets(self) -> list[SocketForward]:
        """Raises ``UserError`` (USAGE)."""
        return [socket_rules.parse(word, False) for word in self.forwards if ":/" in word]


@dataclass(frozen=True, slots=True)
class Ways:
    """How machines are reached, and the agent is brought there; a test has others."""

    open_way: OpenWay
    install: Install


def name_of(address: str) -> str:
    """A name for the instance, made of the host's. Raises ``UserError`` (USAGE) where none can be."""
    host = Address.parse(address).host.lower()
    name = re.sub(r"[^a-z0-9]+", "-", host)[:32].strip("-")
    try:
        check_name(name)
    except UserError:
        raise UserError(
            f"{host} gives no name for an instance", "choose one: --name NAME", ExitCode.USAGE
        ) from None
    return name


def instance_of(home: Home, word: str, name: str | None) -> tuple[InstancePaths, str]:
    """The instance that ``attach WORD --name NAME`` is about, and the machine's address.

    ``word`` may be the name of one that was attached before. Raises ``UserError``.
    """
    if name is None and (known := _known(home, word)):
        return known
    paths = home.instance(name if name is not None else name_of(word))
    check_name(paths.name)
    before = record.load(paths)
    if before is None and _is_vm(paths):
        _taken(f"instance {paths.name} is a VM")
    if before is not None and word == paths.name:
        return paths, before.address
    if before is not None and before.address != word:
        _taken(f"instance {paths.name} is attached to {before.address}")
    Address.parse(word)
    return paths, word


def _known(home: Home, word: str) -> tuple[InstancePaths, str] | None:
    """An instance of that name, or the only one of that address."""
    with suppress(UserError):
        check_name(word)
        if before := record.load(home.instance(word)):
            return home.instance(word), before.address
    of_address = [paths for paths in home.instances() if _address(paths) == word]
    return (of_address[0], word) if len(of_address) == 1 else None


def _address(paths: InstancePaths) -> str:
    with suppress(UserError):
        if found := record.load(paths):
            return found.address
    return ""


def _is_vm(paths: InstancePaths) -> bool:
    return any(each.exists() for each in (paths.config, paths.old_config, paths.state, paths.data_disk))


def _taken(sentence: str) -> NoReturn:
    raise UserError(sentence, "choose another name for this one: --name NAME", ExitCode.USAGE)


@dataclass(frozen=True, slots=True)
class Attempt:
    """To attach ``paths`` to the machine at ``address``, with what is wished for."""

    paths: InstancePaths
    address: str
    wishes: Wishes
    progress: Progress
    ways: Ways
    asked: Asked

    def run(self) -> UpResult:
        """Raises ``UserError``, or ``KeyboardInterrupt`` with everything undone."""
        paths = self.paths
        _check(paths.home, self.wishes)
        paths.home.ensure()
        is_new = not paths.directory.exists()
        paths.ensure()
        try:
            return self._join_or_start()
        finally:
            if is_new and not paths.attached.exists():
                _forget(paths)

    def _join_or_start(self) -> UpResult:
        paths = self.paths
        while True:
            try:
                running = groups.run(starting.running, paths, self.progress)
            except starting.Ending:
                if groups.run(ending.lock_is_free, paths):
                    continue
                raise
            if running is not None and _is_reached(running):
                return _joined(paths, self.wishes)
            with state.locked(paths.up_lock) as ours:
                if ours:
                    if running is None and state.is_locked(paths.lock):
                        continue  # another attach has finished between our look and our lock
                    return self._start()
            self.progress("another agentctl command is starting this instance; waiting for it")
            while state.is_locked(paths.up_lock):
                time.sleep(_INTERVAL)

    def _start(self) -> UpResult:
        """With ``paths.up_lock`` held. One that runs and has lost the machine is ended once that is reached from here:
        what it goes on trying may need an answer. It may be connected again by then, so what runs there to be kept
        must be left alone."""
        paths, wishes = self.paths, self.wishes
        before = record.load(paths) or Attached(self.address, session_name(paths.home, paths.name))
        wanted = before if wishes.keep is None else replace(before, keep=wishes.keep)
        found = groups.run(self._reach, wanted)
        home = found.capabilities.home
        wanted = replace(wanted, program=shlex.join(found.program), home=home)
        specs = folders.chosen(wishes.mounts, paths.home.root, home)
        if state.is_locked(paths.lock):
            groups.run(starting.abandon, paths, not before.keep)
            groups.run(ending.lock_is_free, paths)
        record.save(paths, wanted)  # first: what the configuration is by default depends on it
        configuration.update(paths, lambda: _configured(paths, specs, wishes))
        told = self._asked_again()
        status = self._start_agent()
        warnings = (*told, *status.warnings, *groups.run(_mount_warnings, paths))
        return UpResult(status, started=True, warnings=warnings)

    async def _reach(self, wanted: Attached) -> Installed:
        """The first connection, with somebody who can be asked."""
        self.progress(f"connecting to {wanted.address}")
        async with self.ways.open_way(wanted, self.asked) as way:
            await way.connect()
            return await self.ways.install(way, self.progress)

    def _asked_again(self) -> tuple[str, ...]:
        """What was for one login was for ours. The host agent logs in itself, once, so it needs another; whoever gives
        it is told what that means."""
        spent = [question for question in self.asked.answers if answers.is_for_one_login(question)]
        if not spent:
            return ()
        self.progress(f"{self.address} asks at each login; once more, for the connection that stays")
        for question in spent:
            if self.asked.ask(question, secret=True) is None:
                raise UserError(f"{self.address} was not answered", "attach it again", ExitCode.GUEST)
        return (
            f"{self.address} asks for an answer at each login: when its connection is lost, attach it again "
            f"(agentctl attach {self.paths.name})",
        )

    def _start_agent(self) -> InstanceStatus:
        given = answers.keep(self.asked.answers)
        name = f"the agent on {self.address}"
        try:
            return starting.start(self.paths, self.progress, name, keep_if=(ExitCode.BUSY,), answers=given)
        finally:
            if given is not None:
                os.close(given)


def _forget(paths: InstancePaths) -> None:
    """The folder of a machine that could not be reached."""
    with suppress(OSError):
        for path in (paths.up_lock, paths.lock):
            path.unlink(missing_ok=True)
        paths.directory.rmdir()


def _check(home: Home, wishes: Wishes) -> None:
    """Mistakes are told before anything is connected."""
    folders.chosen(wishes.mounts, home.root, folders.SOME_HOME)
    socket_rules.check(wishes.sockets())
    wishes.rules()


def _is_reached(status: InstanceStatus) -> bool:
    return status.attached is not None and status.attached.link is LinkState.CONNECTED


def _configured(paths: InstancePaths, specs: Sequence[MountSpec], wishes: Wishes) -> InstanceConfig:
    """The file as it is now, with what is asked for."""
    config = configuration.load(paths, Host.measure())
    settings = port_rules.changed(config.ports, ChangePorts(_more(config.ports.rules, wishes.rules())))
    sockets = _more(config.sockets, wishes.sockets())
    changed = replace(
        config,
        mounts=folders.together(config.mounts, specs),
        rules=tuple(settings.rules),
        sockets=socket_rules.changed(config.sockets, ChangeSocketForwards(sockets)),
    )
    configuration.check_sockets(changed)
    return changed


def _more(there: Sequence[T], wanted: Sequence[T]) -> list[T]:
    return [each for each in dict.fromkeys(wanted) if each not in there]


# --- one that runs -----------------------------------------------------------------------------------


def _joined(paths: InstancePaths, wishes: Wishes) -> UpResult:
    """An instance that runs and is connected, with what is asked for besides."""
    now = record.load(paths)
    specs = folders.chosen(wishes.mounts, paths.home.root, now.home if now else "")
    later: tuple[str, ...] = ()
    if now is not None and wishes.keep not in (None, now.keep):
        record.save(paths, replace(now, keep=wishes.keep is True))
        later = (
            "--keep, or that it is not wanted any more, counts from the next attach on: agentctl restart",
        )
    try:
        status, mounted = groups.run(_add, paths, specs, wishes)
    except RemoteFailure as error:
        raise UserError(error.message, error.hint) from None
    return UpResult(status, started=False, warnings=(*later, *status.warnings, *_warnings(mounted)))


async def _add(
    paths: InstancePaths, specs: Sequence[MountSpec], wishes: Wishes
) -> tuple[InstanceStatus, Mounts]:
    async with connected(paths, patience=RESTART_TIME) as link:
        table = await link.request(GetMounts())
        there = [mount.spec for mount in table.mounts]
        folders.together(there, specs)
        taken = {spec.guest_path: spec for spec in there}
        for spec in specs:
            if (other := taken.get(spec.guest_path)) and other != spec:
                raise UserError(
                    f"{other.host_path} is mounted at {spec.guest_path} already",
                    f"take it away first: agentctl mounts rm {spec.guest_path}",
                    ExitCode.USAGE,
                )
        if more := _more(there, specs):
            table = await link.request(AddMounts(more))
        if rules := _more((await link.request(GetPortSettings())).rules, wishes.rules()):
            await link.request(ChangePorts(rules))
        sockets = [row.forward for row in (await link.request(GetSocketForwards())).rows]
        if forwards := _more(sockets, wishes.sockets()):
            await link.request(ChangeSocketForwards(forwards))
        return await link.request(GetStatus()), table


async def _mount_warnings(paths: InstancePaths) -> tuple[str, ...]:
    try:
        async with connected(paths, patience=RESTART_TIME) as link:
            return _warnings(await link.request(GetMounts()))
    except (UserError, RemoteFailure):
        return ()  # whoever ended it in this moment knows more than we do


def _warnings(table: Mounts) -> tuple[str, ...]:
    """One for each folder that was to be there and is not."""
    return tuple(
        f"{mount.spec.guest_path} is not mounted: {mount.reason or mount.state.value}"
        + (f" ({mount.hint})" if mount.hint else "")
        for mount in table.mounts
        if mount.state is not MountState.MOUNTED
    )
