from __future__ import annotations

import pytest

from tests.bench.files import runner
from tests.bench.files.driver import Answer
from tests.bench.files.runner import MAX_LOST, Peer, PeerFailed, Plan, Run
from tests.bench.files.workloads import GROUPS, Request


class FakePeer:
    def __init__(self, name: str, *, broken: bool = False) -> None:
        self.name, self.common, self.own = name, f"/{name}/common", f"/{name}/own"
        self.broken = broken
        self.mounted = 0

    def mount(self) -> None:
        if self.broken:
            raise PeerFailed(f"{self.name} is broken")
        self.mounted += 1


def plan(*names: str, rounds: int = 1, limit: float = 1000.0) -> Plan:
    return Plan(rounds, names, "/guest", drop=True, limit=limit)


class Driver:
    """Answers at once; every sample takes ``seconds`` on a clock of its own, ten times that of ``slow``."""

    def __init__(self, seconds: float = 1.0, lost: str = "", slow: str = "") -> None:
        self.now = 0.0
        self.asked: list[Request] = []
        self._seconds, self._lost, self._slow = seconds, lost, slow

    def ask(self, request: Request, timeout: float) -> Answer:
        self.asked.append(request)
        self.now += self._seconds * (10 if request.workload == self._slow else 1)
        if self._lost and request.common.startswith(f"/{self._lost}/"):
            return Answer(error="no answer")
        return Answer(self._seconds, 3)

    def run(self, plan: Plan, *peers: Peer) -> Run:
        return Run(plan, peers, self.ask, lambda message: None, lambda: self.now)


def test_peers_take_turns_within_a_group_of_workloads() -> None:
    run = Driver().run(plan("grep cold", "grep warm", "append"), FakePeer("a"), FakePeer("b"))
    assert [(sample.workload, sample.peer) for sample in run.samples()] == [
        ("grep cold", "a"), ("grep warm", "a"), ("grep cold", "b"), ("grep warm", "b"), ("append", "a"), ("append", "b"),
    ]  # fmt: skip


def test_another_peer_is_first_in_each_round() -> None:
    run = Driver().run(plan("append", rounds=3), FakePeer("a"), FakePeer("b"))
    assert [(sample.round, sample.peer) for sample in run.samples()] == [
        (1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b"),
    ]  # fmt: skip


def test_each_round_has_a_fresh_mount() -> None:
    peer = FakePeer("a")
    list(Driver().run(plan("append", rounds=3), peer).samples())
    assert peer.mounted == 3


def test_a_peer_that_cannot_be_mounted_is_left_out_of_the_round() -> None:
    run = Driver().run(plan("append"), FakePeer("a", broken=True), FakePeer("b"))
    first, second = run.samples()
    assert (first.workload, first.peer, first.error) == ("mount", "a", "a is broken")
    assert (second.peer, second.error) == ("b", "")


def test_a_peer_that_does_not_answer_is_left_alone_in_the_end() -> None:
    run = Driver(lost="a").run(plan("append", rounds=MAX_LOST + 2), FakePeer("a"), FakePeer("b"))
    samples = list(run.samples())
    assert sum(sample.peer == "a" for sample in samples) == MAX_LOST
    assert sum(sample.peer == "b" for sample in samples) == MAX_LOST + 2


def test_nothing_is_begun_when_time_has_run_out() -> None:
    run = Driver(seconds=10).run(plan("append", rounds=5, limit=25), FakePeer("a"), FakePeer("b"))
    assert len(list(run.samples())) == 3
    assert run.out_of_time


def test_what_is_to_be_warm_is_run_before_unless_its_group_has_done_so() -> None:
    driver = Driver()
    list(
        driver.run(
            plan("import warm", "cat cold", "cat warm", "find warm", "append"), FakePeer("a")
        ).samples()
    )
    assert {request.workload: request.warm_up for request in driver.asked} == {
        "import warm": True, "cat cold": False, "cat warm": False, "find warm": True, "append": False,
    }  # fmt: skip


def test_what_is_too_slow_is_not_repeated_for_ever() -> None:
    driver = Driver(seconds=10)
    run = driver.run(Plan(5, ("append", "unpack"), "/guest", True, 1000.0, patience=15.0), FakePeer("a"))
    assert [sample.round for sample in run.samples()] == [1, 1, 2, 2]
    assert not run.out_of_time


def test_after_a_workload_that_is_not_repeated_the_next_is_still_warmed_up() -> None:
    driver = Driver(slow="find cold")
    run = driver.run(Plan(2, ("find cold", "find warm"), "/guest", True, 1000.0, patience=5.0), FakePeer("a"))
    list(run.samples())
    assert [(request.workload, request.warm_up) for request in driver.asked] == [
        ("find cold", False), ("find warm", False), ("find warm", True),
    ]  # fmt: skip


def test_requests_say_where_the_peer_is() -> None:
    driver = Driver()
    list(driver.run(plan("append"), FakePeer("a")).samples())
    assert driver.asked == [Request("append", "/a/common", "/a/own", "/guest", drop=True, warm_up=False)]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["append"], ["append"]),
        (["git*"], ["git status cold", "git status warm"]),
        (["grep", "stat"], ["grep cold", "grep warm", "stat"]),
        (["nothing"], []),
    ],
)
def test_workloads_are_chosen_by_pattern_or_word(patterns: list[str], expected: list[str]) -> None:
    assert list(runner.select(patterns)) == expected


def test_without_a_choice_all_run() -> None:
    assert len(runner.select([])) == sum(map(len, GROUPS))
