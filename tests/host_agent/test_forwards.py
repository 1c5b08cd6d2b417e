"""The table of forwards, as scripts of news and the effects they have."""

from __future__ import annotations

import errno
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host_agent import forwards, rules
from host_agent.forwards import Change, ClosePort, Effect, ForwardTable, OpenPort
from host_agent.rules import (
    LOCALHOST,
    Decision,
    Forwarding,
    HostAddress,
    HostEnd,
    HostSocket,
    Ignored,
    Static,
)
from protocol.api import (
    DialTcp,
    Forward,
    ForwardState,
    Listener,
    Listeners,
    PortRule,
    PortSettings,
    Proto,
)


def on(port: int, address: str = "0.0.0.0", unit: str = "") -> Listener:
    return Listener(Proto.TCP, address, port, unit)


def local(port: int) -> HostAddress:
    return HostAddress(Proto.TCP, LOCALHOST, port)


def short(host: HostEnd) -> str:
    """The end as the scripts have it: only the port, if it is one of localhost."""
    return str(host).removeprefix("localhost:")


def overlap(one: HostEnd, other: HostEnd) -> bool:
    """Whether Linux takes only one of them."""
    if not (isinstance(one, HostAddress) and isinstance(other, HostAddress)):
        return one == other
    same_port = (one.proto, one.port) == (other.proto, other.port)
    return same_port and (one.address == other.address or rules.EVERYWHERE in (one.address, other.address))


class Host:
    """Carries out a table's effects on an imaginary host, and keeps its clock."""

    def __init__(self, table: ForwardTable | None = None) -> None:
        self.table = table or ForwardTable()
        self.now = 100.0
        self.ends: set[HostEnd] = set()
        self.errors: dict[int, int] = {}
        self.owner = ""
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
                case OpenPort(host):
                    self.log.append(f"open {short(host)}")
                    assert host not in self.ends
                    self.perform(self.bind(host))
                case ClosePort(host):
                    self.log.append(f"close {short(host)}")
                    self.ends.remove(host)
                case Change():
                    self.log.append(effect.kind + (f" {short(effect.host)}" if effect.host else ""))

    def bind(self, host: HostEnd) -> list[Effect]:
        port = host.port if isinstance(host, HostAddress) else 0
        if error := self.errors.get(port):
            return self.table.bind_failed(host, error, self.now, self.owner)
        if len(self.ends) < 100:  # or it takes seconds
            assert not any(overlap(host, end) for end in self.ends)
        self.ends.add(host)
        return self.table.bound(host)

    @property
    def open(self) -> set[int]:
        """The open ports of localhost."""
        return {end.port for end in self.ends if isinstance(end, HostAddress) and end.address == LOCALHOST}

    def change_rules(self, decide: Callable[[Listener], Decision], *statics: Static) -> None:
        self.perform(self.table.change_rules(decide, statics))

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
    assert table.receive(Listeners(True, [on(8080)]), 0.0) == [OpenPort(local(8080))]
    assert table.rows()[0].state is ForwardState.PENDING
    (change,) = table.bound(local(8080))
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


def test_a_privileged_port_that_a_rule_names_is_not_moved_by_a_flag() -> None:
    host = Host(table_of(PortSettings([PortRule(guest_port=8443, ports=1, host_port=443)])))
    host.errors[443] = errno.EACCES
    host.snapshot(on(8443))
    reason = host.row(8443).reason
    assert "ip_unprivileged_port_start=443; or name a port from 1024 on in the rule" in reason
    assert "offset" not in reason


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
    assert (row.state, row.host_port) == (ForwardState.PENDING, 3)
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


def test_a_guest_with_endless_owners_of_one_port_holds_nobody_up() -> None:
    """Who answers was once looked for among all of them for each row: 16 s for 2,000."""
    host = Host()
    began = time.process_time()
    host.snapshot(*(on(8080, unit=f"{number}.service") for number in range(4000)))
    assert len(host.table.rows()) == 4000
    assert host.table.targets(local(8080)) == (DialTcp("127.0.0.1", 8080),)
    assert time.process_time() - began < 5


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
    assert host.table.targets(local(8080)) == tuple(DialTcp(address, 8080) for address in dialled)


def test_nothing_is_dialled_for_a_port_that_has_gone() -> None:
    assert ForwardTable().targets(local(8080)) == ()


def test_a_rule_may_move_a_port_and_several_may_meet_on_one() -> None:
    def decide(listener: Listener) -> Decision:
        return Forwarding(local(10000))

    host = Host(ForwardTable(decide))
    host.snapshot(on(80), on(81))
    assert host.open == {10000}
    assert host.table.targets(local(10000)) == (DialTcp("127.0.0.1", 80),), "the other is another program"
    assert host.row(80).host_port == 10000


# --- other ends than ports of localhost ------------------------------------------------------------

ELSEWHERE = HostAddress(Proto.TCP, "192.168.1.7", 8080)
EVERYWHERE = HostAddress(Proto.TCP, "0.0.0.0", 8080)
SOCKET = HostSocket("/run/web.sock")


def always(decision: Decision) -> Callable[[Listener], Decision]:
    return lambda listener: decision


def test_one_port_of_two_addresses_is_two_ends() -> None:
    decisions = {"0.0.0.0": Forwarding(ELSEWHERE), "127.0.0.1": Forwarding(local(8080))}
    host = Host(ForwardTable(lambda listener: decisions[listener.address]))
    host.snapshot(on(8080, "0.0.0.0"), on(8080, "127.0.0.1"))
    assert host.ends == {ELSEWHERE, local(8080)}
    host.change(removed=[on(8080, "0.0.0.0")])
    assert host.said()[-2:] == ["close 192.168.1.7:8080", "port-closed 192.168.1.7:8080"]
    assert host.ends == {local(8080)}


@pytest.mark.parametrize("everywhere_first", [True, False])
def test_of_all_addresses_and_one_the_earlier_rule_is_there(everywhere_first: bool) -> None:
    """Linux would give the port to who came first, which a restart of the guest's agent changes."""
    everywhere, one = Forwarding(EVERYWHERE, 1), Forwarding(local(8080), 2)
    decisions: dict[int, Decision] = {80: everywhere, 8080: one}
    host = Host(ForwardTable(lambda listener: decisions[listener.port]))
    host.snapshot(on(80) if everywhere_first else on(8080))
    host.change(added=[on(80), on(8080)])
    assert host.ends == {EVERYWHERE}
    row = host.row(8080)
    assert (row.state, row.reason) == (ForwardState.CONFLICT, "0.0.0.0:8080 of this VM comes first")
    host.wait(60)
    assert host.ends == {EVERYWHERE}, "and is not tried"
    decisions[8080] = Forwarding(local(8080), 0)
    host.change_rules(lambda listener: decisions[listener.port])
    assert host.ends == {local(8080)}
    assert (host.row(80).state, host.row(8080).state) == (ForwardState.CONFLICT, ForwardState.LISTENING)
    assert host.row(80).reason == "localhost:8080 of this VM comes first"
    host.change(removed=[on(8080)])
    assert host.ends == {EVERYWHERE}
    assert host.row(80).state is ForwardState.LISTENING
    host.change(removed=[on(80)])
    assert (host.ends, host.table.rows()) == (set(), [])


def test_all_addresses_and_one_by_the_same_rule_are_all_addresses() -> None:
    host = Host(table_of(PortSettings(lan=True)))
    host.snapshot(on(8080, "::1"), on(8080, "172.17.0.1"), on(8081, "::1"))
    host.said()
    host.change(added=[on(8080)])
    assert host.said() == [
        "close 8080",
        "port-conflict 8080",
        "open 0.0.0.0:8080",
        "port-listening 0.0.0.0:8080",
    ]
    assert host.table.targets(EVERYWHERE) == (DialTcp("127.0.0.1", 8080),), "not what is only for localhost"
    host.change(removed=[on(8080)])
    assert host.open == {8080, 8081}


def test_one_address_that_was_a_conflict_is_not_tried_while_all_addresses_are_there() -> None:
    decisions: dict[int, Decision] = {80: Forwarding(EVERYWHERE, 1), 8080: Forwarding(local(8080), 2)}
    host = Host(ForwardTable(lambda listener: decisions[listener.port]))
    host.errors[8080] = errno.EADDRINUSE
    host.snapshot(on(8080))
    host.change(added=[on(80)])
    host.said()
    host.errors.clear()
    host.wait(60)
    assert host.said() == ["open 0.0.0.0:8080", "port-listening 0.0.0.0:8080"]


def test_two_single_addresses_of_a_port_do_not_exclude_each_other() -> None:
    decisions: dict[int, Decision] = {80: Forwarding(ELSEWHERE), 8080: Forwarding(local(8080))}
    host = Host(ForwardTable(lambda listener: decisions[listener.port]))
    udp = replace(EVERYWHERE, proto=Proto.UDP)
    host.change_rules(lambda listener: decisions[listener.port], Static(udp, Proto.UDP, "0.0.0.0", 53))
    host.snapshot(on(80), on(8080))
    assert host.ends == {ELSEWHERE, local(8080), udp}


def test_a_socket_is_an_end_like_a_port() -> None:
    host = Host(ForwardTable(always(Forwarding(SOCKET))))
    host.owner = "/run/web.sock exists and is not a socket"
    host.errors[0] = errno.EADDRINUSE
    host.snapshot(on(80))
    assert host.said() == ["open /run/web.sock", "port-conflict /run/web.sock"]
    assert (
        host.row(80).reason == "/run/web.sock exists and is not a socket; it is taken as soon as it is free"
    )
    host.errors[0] = errno.EACCES
    host.wait(1)
    assert host.row(80).reason == "this host does not allow /run/web.sock"
    host.errors.clear()
    host.wait(60)
    row = host.row(80)
    assert (row.host_address, row.host_port, row.state) == ("/run/web.sock", 0, ForwardState.LISTENING)
    assert host.table.targets(SOCKET) == (DialTcp("127.0.0.1", 80),)


def test_a_conflict_names_who_has_the_port() -> None:
    host = Host()
    host.errors[8080], host.owner = errno.EADDRINUSE, "nginx (pid 7)"
    host.snapshot(on(8080))
    expected = "port 8080 is in use on the host by nginx (pid 7); it is taken as soon as it is free"
    assert host.row(8080).reason == expected


def test_an_address_that_this_machine_lacks_is_taken_when_it_is_there() -> None:
    there = HostAddress(Proto.TCP, "192.168.1.7", 8080)
    host = Host(ForwardTable(always(Forwarding(there))))
    host.errors[8080] = errno.EADDRNOTAVAIL
    host.snapshot(on(8080))
    assert (
        host.row(8080).reason == "192.168.1.7 is no address of this machine now; it is taken as soon as it is"
    )
    host.errors.clear()
    host.wait(5)
    assert host.ends == {there}


# --- rules that change, and static ones ------------------------------------------------------------


def test_other_rules_move_what_they_are_about_and_nothing_else() -> None:
    host = Host()
    host.snapshot(on(80), on(81))
    host.said()
    host.change_rules(lambda listener: Forwarding(local(8080 if listener.port == 80 else listener.port)))
    assert host.said() == ["close 80", "port-closed 80", "open 8080", "port-listening 8080"]
    assert host.open == {81, 8080}
    host.change_rules(always(Ignored("rule 1 says so")))
    assert host.open == set()
    assert {row.reason for row in host.table.rows()} == {"rule 1 says so"}
    host.change_rules(forwards.decide)
    assert host.open == {80, 81}


STATIC = Static(local(8080), Proto.TCP, "0.0.0.0", 80)


def test_a_static_rule_is_open_before_there_is_a_listener_and_after() -> None:
    host = Host(ForwardTable(always(Forwarding(local(8080)))))
    host.change_rules(always(Forwarding(local(8080))), STATIC)
    assert host.said() == ["open 8080", "port-listening 8080"]
    row = Forward(
        Proto.TCP,
        "0.0.0.0",
        80,
        LOCALHOST,
        8080,
        ForwardState.LISTENING,
        "nothing in the VM listens there yet",
    )
    assert host.table.rows() == [row]
    assert host.table.targets(local(8080)) == (DialTcp("127.0.0.1", 80),)
    host.snapshot(on(80, "::"))
    assert [row.guest_address for row in host.table.rows()] == ["::"]
    assert host.table.targets(local(8080)) == (DialTcp("::1", 80), DialTcp("127.0.0.1", 80))
    host.change(removed=[on(80, "::")])
    assert host.said() == []
    host.change_rules(forwards.decide)
    assert host.said() == ["close 8080", "port-closed 8080"]
    assert host.table.rows() == []


def test_a_static_rule_that_is_taken_away_leaves_the_port_to_its_listener() -> None:
    host = Host(ForwardTable(always(Forwarding(local(8080)))))
    host.snapshot(on(80))
    host.change_rules(always(Forwarding(local(8080))), STATIC)
    host.change_rules(always(Forwarding(local(8080))))
    assert host.said() == ["open 8080", "port-listening 8080"]


def test_a_static_rule_whose_port_is_taken_is_a_conflict() -> None:
    host = Host()
    host.errors[8080] = errno.EADDRINUSE
    host.change_rules(forwards.decide, STATIC)
    assert host.row(80).state is ForwardState.CONFLICT
    host.errors.clear()
    host.wait(2)
    assert host.row(80).state is ForwardState.LISTENING


# --- any history -----------------------------------------------------------------------------------

LISTENERS = [on(port, address) for port in (1, 2, 3) for address in ("0.0.0.0", "::")]


@settings(deadline=None)  # a machine may be busy
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


@settings(deadline=None)
@given(
    st.lists(st.sets(st.sampled_from([on(port, at) for port in (1, 2) for at in ("0.0.0.0", "127.0.0.1")])))
)
def test_after_any_history_a_port_is_on_all_addresses_if_anybody_asks_for_them(
    history: list[set[Listener]],
) -> None:
    host = Host(table_of(PortSettings(lan=True, privileged_offset=10000)))
    host.snapshot()
    before: set[Listener] = set()
    for truth in history:
        host.change(added=truth - before, removed=before - truth)
        before = truth
        wanted = {listener.port: LOCALHOST for listener in truth}
        wanted |= {listener.port: rules.EVERYWHERE for listener in truth if listener.address == "0.0.0.0"}
        assert host.ends == {HostAddress(Proto.TCP, at, 10000 + port) for port, at in wanted.items()}
        assert len(host.table.rows()) == len(truth)


# --- who answers where several could ---------------------------------------------------------------


def table_of(settings: PortSettings) -> ForwardTable:
    return ForwardTable(partial(rules.decide, rules=rules.complete(settings)))


def test_a_users_rule_answers_before_a_port_that_is_there_by_itself() -> None:
    rule = PortRule(guest_port=9090, ports=1, host_port=8080)
    host = Host(table_of(PortSettings([rule])))
    host.snapshot(on(8080), on(9090))
    assert [target.port for target in host.table.targets(local(8080))] == [9090]
    assert (host.row(9090).state, host.row(9090).reason) == (ForwardState.LISTENING, "")
    assert host.row(8080).reason == "port 9090 of the VM is there, too, and answers"
    host.said()
    # The order of rules is the order of who answers; nothing is closed for it.
    other = PortRule(guest_port=8081, ports=1, host_port=8080)
    host.change(added=[on(8081)])
    host.said()
    for listed, answering in (([rule, other], 9090), ([other, rule], 8081), ([], 8080)):
        settings = PortSettings(listed)
        host.change_rules(partial(rules.decide, rules=rules.complete(settings)))
        assert host.table.targets(local(8080))[0].port == answering
        assert "close 8080" not in host.said()


def test_a_port_of_the_same_number_answers_before_one_that_was_moved() -> None:
    host = Host(table_of(PortSettings(privileged_offset=10000)))
    host.snapshot(on(80), on(10080, "10.0.0.1"))
    assert [target.port for target in host.table.targets(local(10080))] == [10080]
    assert host.row(80).reason == "port 10080 of the VM is there, too, and answers"
    host.change(removed=[on(10080, "10.0.0.1")])
    assert host.row(80).reason == ""


def test_a_listener_answers_before_a_static_rule_and_statics_in_their_order() -> None:
    table = ForwardTable()
    host = Host(table)
    first, second = (Static(local(80), Proto.TCP, "127.0.0.1", port, rank) for port, rank in ((7, 1), (8, 2)))
    host.change_rules(rules.decide, second, first)
    assert [target.port for target in table.targets(local(80))] == [7]
    host.change_rules(rules.decide, replace(first, rank=3), second)
    assert [target.port for target in table.targets(local(80))] == [8]
    host.snapshot(on(80))
    assert [target.port for target in table.targets(local(80))] == [80]
    assert "close 80" not in host.said()
