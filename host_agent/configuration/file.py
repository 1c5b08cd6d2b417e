"""A configuration as a file that people change: an instance's, or the template of new ones.

The law: what is not understood, or what this machine cannot give, is not put in place; and nobody's change is lost,
be it that of who edited a text for an hour or that of a command which came meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from host_agent import mounts
from host_agent.configuration import config as configuration
from host_agent.configuration import machine as config_machine
from host_agent.configuration.config import Host, InstanceConfig, Mistake
from host_agent.configuration.template import template
from host_agent.errors import ExitCode, UserError
from host_agent.files import write_atomically
from host_agent.paths import Home, InstancePaths


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """Of ``instance``, or the template where that is None."""

    home: Home
    instance: InstancePaths | None

    @property
    def path(self) -> Path:
        return self.instance.config if self.instance else self.home.template

    @property
    def draft(self) -> Path:
        """What is being edited, and what is kept of it if it was not understood."""
        return self.instance.config_draft if self.instance else self.home.template_draft

    @property
    def _lock(self) -> Path:
        return self.instance.config_lock if self.instance else self.home.template_lock

    def text(self, host: Host) -> str:
        """As it is, or what it would begin as. Raises ``UserError``."""
        if self.instance:
            if (text := configuration.text_of(self.path)) is not None:
                return text
            return configuration.current_text(self.instance, configuration.load(self.instance, host))
        text = configuration.text_of(self.path)
        return template(InstanceConfig.default(host), self.home.config_schema) if text is None else text

    def change(self, make: Callable[[str], str], host: Host) -> InstanceConfig:
        """Replace the text by what ``make`` makes of it; nobody changes it meanwhile.

        Raises ``UserError`` for what cannot be; then nothing has changed.
        """
        self.home.ensure()
        if self.instance:
            self.instance.ensure()
        with configuration.locked(self._lock):
            text = make(self.text(host))
            config = self.checked(text, host)
            if self.instance:
                configuration.write(self.instance, text, config)
            else:
                configuration.write_text(self.home, self.path, text)
        return config

    def checked(self, text: str, host: Host) -> InstanceConfig:
        """What ``text`` says. Raises ``UserError`` for what is no configuration, or one that cannot be had here."""
        found = configuration.examined(text.encode(), host)
        if not isinstance(found, InstanceConfig):
            raise NotUnderstood(self.path, found)
        if self.instance:
            found = self._known(found)
            configuration.check_growth(found, self.instance.data_disk)
        configuration.check(found, host)
        return found

    def _known(self, config: InstanceConfig) -> InstanceConfig:
        """With what belongs to it and is not in the text."""
        assert self.instance is not None
        if self.instance.config.exists() or self.instance.machine.exists():
            config = config_machine.completed(self.instance.machine, config)
        elif self.instance.old_config.exists():
            old = configuration.load(self.instance, Host.measure())
            config = config_machine.with_record(config, config_machine.record_of(old))
        return replace(config, mounts=mounts.resolved(config.mounts))

    def keep_draft(self, text: str) -> None:
        write_atomically(self.draft, text.encode())

    def forget_draft(self) -> None:
        self.draft.unlink(missing_ok=True)

    def edited(self, edit: Callable[[Path], None], host: Host) -> InstanceConfig | None:
        """Let ``edit`` have a copy, and put it in place if it is understood; None if nothing was changed.

        Raises ``UserError``, with the copy kept as ``draft``, where the next one goes on.
        """
        self.home.ensure()
        configuration.save_schema(self.home)
        before = self.text(host)
        if not self.draft.exists():
            self.keep_draft(before)
        try:
            edit(self.draft)
        finally:
            after = configuration.text_of(self.draft)
            if after == before:
                self.forget_draft()
        if after in (None, before):
            return None

        def replaced(current: str) -> str:
            if current != before:
                raise UserError(
                    f"{self.path} was changed by somebody else meanwhile, and is as they left it",
                    f"yours is in {os.fspath(self.draft)}; look at both, then: agentctl config edit",
                    ExitCode.BUSY,
                )
            return str(after)

        config = self.change(replaced, host)
        self.forget_draft()
        return config


class NotUnderstood(UserError):
    """A text is no configuration; ``mistakes`` has all that is wrong with it."""

    def __init__(self, path: Path, mistakes: list[Mistake]) -> None:
        super().__init__(f"{path}{mistakes[0]}", configuration.EDIT_HINT, ExitCode.USAGE)
        self.mistakes = mistakes
