"""The table of forwards, as scripts of news and the effects they have."""

from __future__ import annotations

import errno
import random
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import forwards
from host_agent.forwards import Change, ClosePort, Effect, ForwardTable, OpenPort
from host_agent.rules import Decision, Forwarding
from protocol.api import DialTcp, Forward, ForwardState, Listener, Listeners, Proto


def on(port: int, address: str = "0.0.0.0", unit: str = "") -> Listener:
    return Listener(Proto.TCP, address, port, unit)


class Host:
    """Carries out a table's effects on an imaginary host, and keeps its clock."""

    def __init__(self, table: ForwardTable | None = None) -> None:
        self.table = table or ForwardTable()
        self.now = 100.0
        self.open: set[int] = set()
        self.errors: dict[int, int] = {}
        self.log: list[str] = []

    def snapshot(self, *listeners: Listener) -> None:
        self.perform(self.table.receive(Listeners(True, list(listeners)), self.now))

    def change(self, added: Iterable[Listener] = (), removed: Iterable[Listener] = ()) -> None:
        self.perform(self.table.receive(Listeners(False, list(added), list(removed)), self.now))

    def wait(self, seconds: float) -> None:
        """Let time pass, from deadline to deadline."""
        end = self.now + seconds
        while (deadline := self.table.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.perform(self.table.expire(self.now))
        self.now = end

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case OpenPort(port):
                    self.log.append(f"open {port}")
                    assert port not in self.open
                    self.perform(self.bind(port))
                case ClosePort(port):
                    self.log.append(f"close {port}")
                    self.open.remove(port)
                case Change():
                    self.log.append(effect.kind + (f" {effect.port}" if effect.port else ""))

    def bind(self, port: int) -> list[Effect]:
        if error := self.errors.get(port):
            return self.table.bind_failed(port, error, self.now)
        self.open.add(port)
        return self.table.bound(port)

    def said(self) -> list[str]:
        log, self.log = self.log, []
        return log

    def row(self, port: int) -> Forward:
        (row,) = [row for row in self.table.rows() if row.guest_port == port]
        return row


def test_a_port_opens_with_its_listener_and_closes_with_it() -> None:
    host = Host()
    host.snapshot()
    host.change(added=[on(8080, unit="docker.service")])
    assert host.said() == ["open 8080", "port-listening 8080"]
    expected = Forward(
        Proto.TCP, "0.0.0.0", 8080, "localhost", 8080, ForwardState.LISTENING, unit="docker.service"
    )
    assert host.table.rows() == [expected]
    host.change(removed=[on(8080, unit="docker.service")])
    assert host.said() == ["close 8080", "port-closed 8080"]
    assert host.table.rows() == []


def test_a_row_is_pending_until_the_bind_is_reported() -> None:
    table = ForwardTable()
    assert table.receive(Listeners(True, [on(8080)]), 0.0) == [OpenPort(8080)]
    assert table.rows()[0].state is ForwardState.PENDING
    (change,) = table.bound(8080)
    assert isinstance(change, Change)
    assert (change.kind, change.message) == ("port-listening", "localhost:8080 is forwarded to the VM")


def test_a_host_port_is_shared_and_goes_with_the_last_listener() -> None:
    host = Host()
    host.snapshot(on(8080, "0.0.0.0"), on(8080, "::"))
    host.change(removed=[on(8080, "0.0.0.0")])
    assert host.said() == ["open 8080", "port-listening 8080"]
    host.change(removed=[on(8080, "::")])
    assert host.said() == ["close 8080", "port-closed 8080"]


def test_a_server_that_moves_to_another_address_within_a_notice_keeps_its_port() -> None:
    host = Host()
    host.snapshot(on(8080, "127.0.0.1"))
    host.said()
    host.change(added=[on(8080, "0.0.0.0")], removed=[on(8080, "127.0.0.1")])
    assert host.said() == []
    assert host.open == {8080}


def test_a_listener_that_came_and_went_within_a_notice_opens_nothing() -> None:
    host = Host()
    host.snapshot()
    host.change(added=[on(8080)], removed=[on(8080)])
    assert host.said() == []


def test_repeated_and_unknown_news_changes_nothing() -> None:
    host = Host()
    host.snapshot(on(8080))
    host.said()
    host.change(added=[on(8080)], removed=[on(9090)])
    assert host.said() == []
    host.change(removed=[on(8080)])
    host.change(removed=[on(8080)])
    assert host.said() == ["close 8080", "port-closed 8080"]


def test_an_ignored_listener_has_a_row_with_the_reason_and_no_port() -> None:
    host = Host()
    host.snapshot(on(22, unit="ssh.service"))
    assert host.said() == []
    row = host.row(22)
    assert (row.state, row.host_address, row.host_port) == (ForwardState.IGNORED, "", 0)
    assert row.reason == "the VM's own SSH server"


def test_rows_are_ordered_by_port_and_address() -> None:
    host = Host()
    host.snapshot(on(90), on(80, "::"), on(80, "0.0.0.0"))
    assert [(row.guest_port, row.guest_address) for row in host.table.rows()] == [
        (80, "0.0.0.0"),
        (80, "::"),
        (90, "0.0.0.0"),
    ]


# --- taken and privileged ports --------------------------------------------------------------------


def test_a_taken_port_is_a_conflict_and_is_taken_when_it_is_free() -> None:
    host = Host()
    host.errors[8080] = errno.EADDRINUSE
    host.snapshot(on(8080))
    assert host.said() == ["open 8080", "port-conflict 8080"]
    assert host.row(8080).state is ForwardState.CONFLICT
    assert "in use on the host" in host.row(8080).reason
    host.wait(2.0)
    assert host.said() == ["open 8080"], "a retry that fails alike is no news"
    host.errors.clear()
    host.wait(2.0)
    assert host.said() == ["open 8080", "port-listening 8080"]
    assert host.row(8080).reason == ""
    assert host.table.deadline() is None


def test_the_retries_of_a_conflict_become_rarer_up_to_five_seconds() -> None:
    host = Host()
    host.errors[8080] = errno.EADDRINUSE
    host.snapshot(on(8080))
    delays = []
    for _ in range(6):
        deadline = host.table.deadline()
        assert deadline is not None
        delays.append(deadline - host.now)
        host.wait(delays[-1])
    assert delays == [1, 2, 4, 5, 5, 5]


def test_a_conflict_that_follows_a_success_is_retried_soon_again() -> None:
    host = Host()
    host.errors[8080] = errno.EADDRINUSE
    host.snapshot(on(8080))
    host.wait(30)
    host.errors.clear()
    host.wait(5)
    assert host.open == {8080}
    host.change(removed=[on(8080)])
    host.errors[8080] = errno.EADDRINUSE
    host.change(added=[on(8080)])
    assert host.table.deadline() == host.now + 1


def test_a_conflict_is_not_retried_when_its_listener_has_gone() -> None:
    host = Host()
    host.errors[8080] = errno.EADDRINUSE
    host.snapshot(on(8080))
    host.said()
    host.change(removed=[on(8080)])
    assert host.said() == ["port-closed 8080"], "there is nothing to close"
    host.wait(60)
    assert host.said() == []


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM])
def test_a_privileged_port_is_denied_with_what_to_do(error: int) -> None:
    host = Host()
    host.errors[80] = error
    host.snapshot(on(80))
    assert host.said() == ["open 80", "port-denied 80"]
    assert "sudo sysctl net.ipv4.ip_unprivileged_port_start=80" in host.row(80).reason
    host.wait(29)
    assert host.said() == []
    host.errors.clear()
    host.wait(1)
    assert host.said() == ["open 80", "port-listening 80"]


def test_a_host_without_descriptors_leaves_the_port_pending_and_tries_again() -> None:
    host = Host()
    host.errors[8080] = errno.EMFILE
    host.snapshot(on(8080))
    assert host.row(8080).state is ForwardState.PENDING
    assert host.row(8080).reason == "Too many open files; trying again"
    host.errors.clear()
    host.wait(5)
    assert host.open == {8080}


# --- lost links ------------------------------------------------------------------------------------


def test_a_lost_link_closes_nothing_and_the_next_snapshot_is_reconciled() -> None:
    host = Host()
    host.snapshot(on(1001), on(1002))
    host.said()
    host.table.link_lost()
    assert host.open == {1001, 1002}
    host.snapshot(on(1002), on(1003))
    assert host.said() == ["open 1003", "port-listening 1003"]
    host.wait(forwards.SETTLE)
    assert host.said() == ["close 1001", "port-closed 1001"]
    assert host.open == {1002, 1003}


def test_a_snapshot_in_pieces_closes_nothing_that_a_later_piece_names() -> None:
    host = Host()
    host.snapshot(on(1001), on(1002))
    host.table.link_lost()
    host.said()
    host.snapshot(on(1001))
    host.change(added=[on(1002)])
    host.wait(10)
    assert host.said() == []


def test_changes_before_the_snapshot_of_a_session_are_not_believed() -> None:
    host = Host()
    host.change(added=[on(8080)])
    host.snapshot(on(9090))
    host.table.link_lost()
    host.change(removed=[on(9090)])
    assert host.open == {9090}


def test_a_link_lost_while_a_snapshot_settles_closes_nothing() -> None:
    host = Host()
    host.snapshot(on(1001))
    host.snapshot()
    host.table.link_lost()
    host.wait(60)
    assert host.open == {1001}


def test_a_listener_removed_while_a_snapshot_settles_is_closed_once() -> None:
    host = Host()
    host.snapshot(on(1001))
    host.said()
    host.snapshot()
    host.change(removed=[on(1001)])
    host.wait(60)
    assert host.said() == ["close 1001", "port-closed 1001"]


# --- limits ----------------------------------------------------------------------------------------


def test_beyond_the_limit_listeners_wait_for_a_place_and_it_is_said_once() -> None:
    host = Host(ForwardTable(max_forwards=2))
    host.snapshot(on(1), on(2), on(3), on(4))
    assert host.said() == [
        "open 1",
        "port-listening 1",
        "open 2",
        "port-listening 2",
        "port-limit",
    ]
    row = host.row(3)
    assert (row.state, row.host_port) == (ForwardState.IGNORED, 0)
    assert row.reason == "the limit of 2 forwards is reached"
    host.change(removed=[on(1)])
    assert host.said() == ["close 1", "port-closed 1", "open 3", "port-listening 3"]
    host.change(removed=[on(4)])
    host.change(added=[on(5)])
    assert host.said() == ["port-limit"], "it had ended in between"


def test_the_places_of_one_notice_are_given_after_those_it_frees() -> None:
    host = Host(ForwardTable(max_forwards=1))
    host.snapshot(on(1))
    host.change(added=[on(2)], removed=[on(1)])
    assert host.open == {2}
    assert "port-limit" not in host.said()


def test_a_guest_with_endless_listeners_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "MAX_LISTENERS", 3)
    host = Host()
    host.snapshot(*(on(port) for port in range(1, 10)))
    assert len(host.table.rows()) == 3
    assert host.said().count("port-limit") == 1


def test_ten_thousand_listeners_do_not_collapse_the_table() -> None:
    host = Host()
    listeners = [on(port) for port in range(1, 10_001)]
    host.snapshot(*listeners)
    assert len(host.open) == forwards.MAX_FORWARDS
    host.change(removed=listeners)
    assert host.open == set()
    assert host.table.rows() == []


def test_long_words_are_cut_and_what_was_added_is_still_what_is_removed() -> None:
    host = Host()
    long, wide = on(80, unit="u" * 200_000), on(81, "é" * 200_000, unit="a" * 255 + "\U0001f600")
    host.snapshot(long, wide, on(82, unit="b" * 256))
    units = [row.unit for row in host.table.rows()]
    assert units == ["u" * 256, "a" * 255 + "\\", "b" * 256]
    assert host.row(81).guest_address == "\\xe9" * 64
    assert host.row(81).reason == "not a numeric address"
    assert host.open == {80, 82}
    host.change(removed=[long, wide])
    assert [row.guest_port for row in host.table.rows()] == [82]
    assert host.open == {82}


def test_a_guest_with_long_words_costs_little_memory() -> None:
    table = ForwardTable()
    tracemalloc.start()
    try:
        table.receive(Listeners(True, []), 0.0)
        for port in range(1, 401):
            table.receive(
                Listeners(False, [on(port, "fe80::1%" + "x" * 100_000, f"{port}" + "u" * 100_000)]), 0.0
            )
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table.rows()) == 400
    assert taken < 400 * 2000


# --- what to dial ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "dialled"),
    [
        (["0.0.0.0"], ["127.0.0.1"]),
        (["127.0.0.1"], ["127.0.0.1"]),
        (["::"], ["::1"]),
        (["::1"], ["::1"]),
        (["0.0.0.0", "::"], ["127.0.0.1", "::1"]),
        (["::", "127.0.0.1", "0.0.0.0"], ["127.0.0.1", "::1"]),
        (["127.0.0.53"], ["127.0.0.53"]),
        (["172.17.0.1", "127.0.0.53", "::1"], ["::1", "127.0.0.53", "172.17.0.1"]),
        (["fd00::7"], ["fd00::7"]),
    ],
)
def test_the_best_address_is_dialled_first(addresses: list[str], dialled: list[str]) -> None:
    host = Host()
    host.snapshot(*(on(8080, address) for address in addresses))
    assert host.table.targets(8080) == tuple(DialTcp(address, 8080) for address in dialled)


def test_nothing_is_dialled_for_a_port_that_has_gone() -> None:
    assert ForwardTable().targets(8080) == ()


def test_a_rule_may_move_a_port_and_several_may_meet_on_one() -> None:
    def decide(listener: Listener) -> Decision:
        return Forwarding(10000)

    host = Host(ForwardTable(decide))
    host.snapshot(on(80), on(81))
    assert host.open == {10000}
    assert host.table.targets(10000) == (DialTcp("127.0.0.1", 80), DialTcp("127.0.0.1", 81))
    assert host.row(80).host_port == 10000


# --- any history -----------------------------------------------------------------------------------

LISTENERS = [on(port, address) for port in (1, 2, 3) for address in ("0.0.0.0", "::")]


@given(st.randoms(use_true_random=False))
def test_after_any_history_the_open_ports_are_those_that_listeners_ask_for(chance: random.Random) -> None:
    host = Host()
    truth: set[Listener] = set()
    host.snapshot()
    for _ in range(30):
        before, truth = truth, {listener for listener in LISTENERS if chance.random() < 0.5}
        match chance.randrange(4):
            case 0:
                host.table.link_lost()
                host.snapshot(*truth)
            case 1:
                host.errors = {port: errno.EADDRINUSE for port in (1, 2, 3) if chance.random() < 0.3}
                host.change(added=truth - before, removed=before - truth)
            case 2:
                host.table.link_lost()
                pieces = sorted(truth)
                host.snapshot(*pieces[:2])
                host.change(added=pieces[2:])
            case _:
                host.change(added=truth - before, removed=before - truth)
        if chance.random() < 0.5:
            host.wait(chance.random() * 3)
    host.errors.clear()
    host.wait(10)
    assert host.open == {listener.port for listener in truth}
    assert {(row.guest_port, row.guest_address) for row in host.table.rows()} == {
        (listener.port, listener.address) for listener in truth
    }
    assert all(row.state is ForwardState.LISTENING for row in host.table.rows())
