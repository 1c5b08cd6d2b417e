"""Rules that are changed while the instance runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from host_agent.errors import ExitCode, UserError
from host_agent.port_rules import PortRules, changed
from host_agent.rules import LOCALHOST, Decision, Forwarding, HostAddress, Static
from protocol.api import ChangePorts, Listener, PortRule, PortSettings, Proto

WEB = PortRule(guest_port=80, ports=1, host_port=8080)
DATABASE = PortRule(Proto.TCP, guest_port=5432, ports=1, host_port=5432, static=True)
BROKEN = PortRule(guest_port=0, ports=1)


class Runner:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.decide: Callable[[Listener], Decision] | None = None
        self.statics: list[Static] = []
        self.remembered: list[PortSettings] = []
        self.full = False

    def apply(self, decide: Callable[[Listener], Decision], statics: Iterable[Static]) -> None:
        self.decide, self.statics = decide, list(statics)

    def remember(self, settings: PortSettings) -> None:
        if self.full:
            raise OSError("the disk is full")
        self.remembered.append(settings)

    def host_port(self, guest_port: int) -> int:
        assert self.decide is not None
        decision = self.decide(Listener(Proto.TCP, "0.0.0.0", guest_port))
        assert isinstance(decision, Forwarding)
        assert isinstance(decision.host, HostAddress)
        return decision.host.port


def test_what_was_remembered_is_applied_at_the_start() -> None:
    runner = Runner()
    PortRules(PortSettings([WEB, DATABASE], privileged_offset=10000), runner.apply, runner.remember)
    assert (runner.host_port(80), runner.host_port(81)) == (8080, 10081)
    assert runner.statics == [Static(HostAddress(Proto.TCP, LOCALHOST, 5432), Proto.TCP, "127.0.0.1", 5432)]
    assert runner.remembered == []


def test_a_change_is_applied_and_remembered() -> None:
    runner = Runner()
    ports = PortRules(PortSettings(), runner.apply, runner.remember)
    assert runner.host_port(80) == 80
    settings = ports.change(ChangePorts(add=[WEB]))
    assert runner.host_port(80) == 8080
    assert runner.remembered == [settings] == [PortSettings([WEB])]
    ports.change(ChangePorts(remove=[WEB], lan=True))
    assert ports.settings == PortSettings(lan=True)
    assert runner.host_port(80) == 80


def test_what_cannot_be_or_cannot_be_remembered_changes_nothing() -> None:
    runner = Runner()
    ports = PortRules(PortSettings([WEB]), runner.apply, runner.remember)
    with pytest.raises(UserError):
        ports.change(ChangePorts(add=[BROKEN]))
    runner.full = True
    with pytest.raises(OSError, match="full"):
        ports.change(ChangePorts(remove=[WEB]))
    assert ports.settings == PortSettings([WEB])
    assert runner.host_port(80) == 8080


def test_a_rule_that_is_added_comes_first_and_is_there_once() -> None:
    settings = changed(PortSettings([WEB, DATABASE]), ChangePorts(add=[DATABASE]))
    assert settings.rules == [DATABASE, WEB]


def test_a_setting_that_is_not_named_stays() -> None:
    before = PortSettings([WEB], lan=True, privileged_offset=20000)
    assert changed(before, ChangePorts()) == before
    assert changed(before, ChangePorts(lan=False, privileged_offset=0)) == PortSettings([WEB])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ChangePorts(remove=[DATABASE]), "there is no rule 5432/tcp"),
        (ChangePorts(add=[BROKEN]), "rule 1: guest_port is 0; ports are 1-65535"),
        (ChangePorts(privileged_offset=5), "the privileged offset is 5; it can be 0 (none) or 1023 to 64512"),
    ],
)
def test_what_cannot_be_is_refused(request_: ChangePorts, message: str) -> None:
    with pytest.raises(UserError) as caught:
        changed(PortSettings([WEB]), request_)
    assert caught.value.message == message
    assert caught.value.hint
    assert caught.value.exit_code in (ExitCode.USAGE, ExitCode.GENERAL)
