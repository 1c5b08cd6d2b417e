from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from guest_agent import host_network
from guest_agent.host_network import ENVIRONMENT, HostNetwork, dns_rules, login_environment, quoted
from guest_agent.trust import BUNDLE
from protocol.api import UseHostNetwork
from protocol.errors import ErrorCode, RpcError

PROXIES = {"http_proxy": "http://10.0.2.2:3128", "no_proxy": "localhost,10.0.2.2"}


def request(port: int = 5300, **options: Any) -> UseHostNetwork:
    return UseHostNetwork("10.0.2.3", "10.0.2.2", port, **options)


class Guest:
    """A root of its own; the rules that the kernel was given, and when Docker could have read what it reads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rules: list[str] = []
        self.readable: list[str] = []
        self.fails: Exception | None = None
        self.again()

    def again(self) -> None:
        """Another agent comes, as after a crash."""
        self.network = HostNetwork(
            self._on_readable, self.root, restore_rules=self._restore, rehash=lambda folder: None
        )

    def _restore(self, rules: str) -> None:
        if self.fails is not None:
            raise self.fails
        self.rules.append(rules)

    def _on_readable(self) -> None:
        self.readable.append(self.environment)

    @property
    def environment(self) -> str:
        path = self.root / ENVIRONMENT
        return path.read_text() if path.is_file() else ""

    async def use(self, request: UseHostNetwork) -> list[str]:
        return (await self.network.use(request)).problems


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    (tmp_path / "etc").mkdir()
    return Guest(tmp_path)


async def test_the_first_time_all_is_done_and_then_nothing(guest: Guest) -> None:
    wanted = request(environment=PROXIES, certificates=[b"a certificate"])
    assert await guest.use(wanted) == []
    assert guest.rules == [dns_rules("10.0.2.3", "10.0.2.2", 5300, hook=True)]
    assert "http_proxy=http://10.0.2.2:3128\n" in guest.environment
    written = [(guest.root / name).stat().st_ino for name in (ENVIRONMENT, BUNDLE)]
    assert await guest.use(wanted) == []
    guest.again()
    assert await guest.use(wanted) == []
    assert len(guest.rules) == 1
    assert [(guest.root / name).stat().st_ino for name in (ENVIRONMENT, BUNDLE)] == written


async def test_another_port_another_way_and_none_the_machines_own(guest: Guest) -> None:
    await guest.use(request(5300))
    await guest.use(request(5301))
    guest.again()
    await guest.use(request(0))
    await guest.use(request(5302))
    assert guest.rules == [
        dns_rules("10.0.2.3", "10.0.2.2", 5300, hook=True),
        dns_rules("10.0.2.3", "10.0.2.2", 5301, hook=False),
        dns_rules("10.0.2.3", "10.0.2.2", 0, hook=False),
        dns_rules("10.0.2.3", "10.0.2.2", 5302, hook=False),
    ]


async def test_without_a_port_no_rule_is_made(guest: Guest) -> None:
    await guest.use(request(0))
    assert guest.rules == []


def test_rules() -> None:
    assert dns_rules("10.0.2.3", "10.0.2.2", 5300, hook=True).splitlines() == [
        "*nat",
        ":AGENTCTL-DNS - [0:0]",
        "-A AGENTCTL-DNS -d 10.0.2.3/32 -p udp -m udp --dport 53 -j DNAT --to-destination 10.0.2.2:5300",
        "-A AGENTCTL-DNS -d 10.0.2.3/32 -p tcp -m tcp --dport 53 -j DNAT --to-destination 10.0.2.2:5300",
        "-A PREROUTING -j AGENTCTL-DNS",
        "-A OUTPUT -j AGENTCTL-DNS",
        "COMMIT",
    ]
    assert dns_rules("10.0.2.3", "10.0.2.2", 0, hook=False).splitlines() == [
        "*nat",
        ":AGENTCTL-DNS - [0:0]",
        "COMMIT",
    ]


async def test_proxies_come_and_go_and_others_lines_stay(guest: Guest) -> None:
    (guest.root / ENVIRONMENT).write_text("EDITOR=nano\n")
    await guest.use(request(environment=PROXIES))
    assert login_environment(guest.root) == {"EDITOR": "nano", **PROXIES}
    await guest.use(request())
    assert guest.environment == "EDITOR=nano\n"


async def test_docker_may_read_before_the_kernel_has_its_rules(guest: Guest) -> None:
    guest.fails = OSError(2, "No such file or directory")
    (problem,) = await guest.use(request(environment=PROXIES))
    assert problem == "the VM does not ask this machine for names: No such file or directory"
    (readable,) = guest.readable
    assert "http_proxy" in readable
    # The next session tries again.
    guest.fails = None
    assert await guest.use(request(environment=PROXIES)) == []
    assert guest.rules == [dns_rules("10.0.2.3", "10.0.2.2", 5300, hook=True)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (subprocess.CalledProcessError(2, ["iptables-restore"], stderr=b"line 2 failed\n"), "line 2 failed"),
        (subprocess.TimeoutExpired(["iptables-restore"], 20), "timed out"),
    ],
)
async def test_why_a_program_failed_is_said(guest: Guest, error: Exception, said: str) -> None:
    guest.fails = error
    (problem,) = await guest.use(request())
    assert said in problem


async def test_what_cannot_be_written_is_said_and_the_rest_is_done(guest: Guest) -> None:
    (guest.root / "etc/environment").mkdir()
    problems = await guest.use(request(environment=PROXIES))
    assert [problem.partition(":")[0] for problem in problems] == [
        "the VM does not use this machine's proxies"
    ]
    assert len(guest.rules) == len(guest.readable) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        UseHostNetwork("10.0.2.3 -j ACCEPT", "10.0.2.2", 53),
        UseHostNetwork("10.0.2.3", "::1", 53),
        request(-1),
        request(65536),
        request(environment={"A B": "x"}),
        request(environment={"A": "x\nPATH=/evil"}),
        request(environment={"A": "x" * 10_000}),
    ],
)
async def test_what_makes_no_sense_is_refused_with_nothing_done(guest: Guest, wrong: UseHostNetwork) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.use(wrong)
    assert caught.value.code is ErrorCode.INVALID
    assert (guest.rules, guest.environment, guest.readable) == ([], "", [])


async def test_two_sessions_that_follow_each_other_quickly_are_served_in_turn(guest: Guest) -> None:
    async with trio.open_nursery() as nursery:
        for port in (5300, 5301, 5302):
            nursery.start_soon(guest.use, request(port))
    assert len(guest.rules) == 3
    assert sum("PREROUTING" in rules for rules in guest.rules) == 1


def test_logins_read_what_pam_would(tmp_path: Path) -> None:
    assert login_environment(tmp_path) == {}
    (tmp_path / "etc").mkdir()
    (tmp_path / ENVIRONMENT).write_text('# x\nA=1\nexport B="2 3"\nno sense\n C=\n1D=4\n')
    assert login_environment(tmp_path) == {"A": "1", "B": "2 3", "C": ""}


VALUES = [
    "",
    "plain",
    "a b",
    " a ",
    '"',
    "'a'",
    "\\",
    "a\\",
    'say "hi" \\"',
    "#1",
    "$HOME `id`",
    "é",
    "a;b",
    '"a"',
]


@pytest.mark.parametrize("value", VALUES)
async def test_any_value_comes_out_as_it_went_in(guest: Guest, value: str) -> None:
    assert await guest.use(request(environment={"A": value, "B": "1"})) == []
    assert login_environment(guest.root) == {"A": value, "B": "1"}


def test_a_value_is_quoted_as_systemd_reads_it() -> None:
    assert [quoted(value) for value in ("a=b", "a b", 'a"\\', "$x")] == ["a=b", '"a b"', r'"a\"\\"', r'"\$x"']


def test_a_chain_is_made_by_the_real_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "iptables-restore"
    program.write_text('#!/bin/sh\n[ "$*" = --noflush ] || exit 1\ncat >"$(dirname "$0")/rules"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    host_network.restore_rules("*nat\nCOMMIT\n")
    assert (tmp_path / "rules").read_text() == "*nat\nCOMMIT\n"
