"""The settings of ports, as they are changed while an instance runs.

The law: what is applied is remembered, and nothing is applied that cannot be, or could not be remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from host_agent import rules
from host_agent.configuration.config import check_ports
from host_agent.errors import UserError
from host_agent.rule_text import words
from host_agent.rules import Decision, Rule, Static
from protocol.api import ChangePorts, Listener, PortRule, PortSettings

Apply = Callable[[Callable[[Listener], Decision], Iterable[Static]], None]


class PortRules:
    """Holds the settings: ``apply`` makes them so, ``remember`` keeps them and may raise ``OSError``."""

    def __init__(
        self, settings: PortSettings, apply: Apply, remember: Callable[[PortSettings], None]
    ) -> None:
        self.settings = settings
        self._more: tuple[Rule, ...] = ()
        self._apply_rules = apply
        self._remember = remember
        self._apply()

    def change(self, request: ChangePorts) -> PortSettings:
        """Raises ``UserError`` for what cannot be, ``OSError`` if it could not be remembered."""
        settings = changed(self.settings, request)
        self._remember(settings)
        self.settings = settings
        self._apply()
        return settings

    def add(self, *more: Rule) -> None:
        """Those that come after the user's, of what is only known of the guest that is there."""
        if more != self._more:
            self._more = more
            self._apply()

    def _apply(self) -> None:
        listed = rules.complete(self.settings, self._more)
        self._apply_rules(partial(rules.decide, rules=listed), rules.statics(self.settings))


def changed(settings: PortSettings, request: ChangePorts) -> PortSettings:
    """``settings`` after ``request``. A rule that is added again moves to the front. Raises ``UserError``."""
    kept = list(settings.rules)
    for rule in request.remove:
        if rule not in kept:
            raise UserError(f"there is no rule {words(rule)}", "see: agentctl forward list")
        kept.remove(rule)
    result = replace(settings, rules=[*dict.fromkeys(request.add), *_without(kept, request.add)])
    if request.lan is not None:
        result = replace(result, lan=request.lan)
    if request.privileged_offset is not None:
        result = replace(result, privileged_offset=request.privileged_offset)
    check_ports(result)
    return result


def _without(listed: Iterable[PortRule], others: Iterable[PortRule]) -> list[PortRule]:
    return [rule for rule in listed if rule not in list(others)]
