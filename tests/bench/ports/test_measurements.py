from __future__ import annotations

import pytest

from tests.bench.ports.client import MeasureFailed
from tests.bench.ports.measurements import (
    EMULATED,
    MAX_FAILED,
    MEASUREMENTS,
    TINY,
    Effort,
    Measurement,
    Peer,
    Run,
    select,
)
from tests.bench.ports.report import Row, Sample

A, B = Peer("a", 1), Peer("b", 2)


class Clock:
    """Every sample takes a second of it; the ports in ``broken`` fail."""

    def __init__(self, *broken: int) -> None:
        self.now = 0.0
        self.broken = set(broken)

    def measurement(self, name: str, *rows: str) -> Measurement:
        def take(port: int, effort: Effort) -> list[float]:
            self.now += 1.0
            if port in self.broken:
                raise MeasureFailed("it is broken")
            return [float(port)] * len(rows or (name,))

        return Measurement(name, tuple(Row(row, "us") for row in rows or (name,)), take)

    def run(self, *measurements: Measurement, rounds: int = 1, limit: float = 1000.0) -> Run:
        return Run(measurements, [A, B], TINY, rounds=rounds, limit=limit, clock=lambda: self.now)


def order(run: Run) -> list[tuple[int, str, str]]:
    return [(sample.round, sample.row, sample.peer) for sample in run.samples()]


def test_peers_take_turns_at_each_measurement_and_another_is_first_in_each_round() -> None:
    clock = Clock()
    assert order(clock.run(clock.measurement("x"), clock.measurement("y"), rounds=2)) == [
        (1, "x", "a"), (1, "x", "b"), (1, "y", "a"), (1, "y", "b"),
        (2, "x", "b"), (2, "x", "a"), (2, "y", "b"), (2, "y", "a"),
    ]  # fmt: skip


def test_a_measurement_gives_a_sample_for_each_of_its_rows() -> None:
    clock = Clock()
    samples = list(clock.run(clock.measurement("x", "x p50", "x p99")).samples())
    assert samples[:2] == [Sample(1, "x p50", "a", 1.0), Sample(1, "x p99", "a", 1.0)]


def test_a_peer_that_fails_again_and_again_is_left_alone() -> None:
    clock = Clock(B.port)
    samples = list(clock.run(clock.measurement("x"), rounds=10).samples())
    assert [sample.error for sample in samples if sample.peer == "b"] == ["it is broken"] * MAX_FAILED
    assert len([sample for sample in samples if sample.peer == "a"]) == 10


def test_a_peer_that_recovers_is_not() -> None:
    clock = Clock(B.port)
    taken = 0
    for sample in clock.run(clock.measurement("x"), rounds=10).samples():
        taken += sample.peer == "b"
        clock.broken = {B.port} if taken % MAX_FAILED else set()
    assert taken == 10


def test_nothing_is_begun_when_time_is_up() -> None:
    clock = Clock()
    run = clock.run(clock.measurement("x"), rounds=10, limit=2.5)
    assert len(order(run)) == 3
    assert run.out_of_time


def test_a_run_that_ends_in_time_says_so() -> None:
    clock = Clock()
    run = clock.run(clock.measurement("x"))
    order(run)
    assert not run.out_of_time


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*x64"], ["to guest x64", "from guest x64"]),
        (["connect", "round"], ["round trip", "connect"]),
        ([], [measurement.name for measurement in MEASUREMENTS]),
        (["nothing"], []),
    ],
)
def test_measurements_are_chosen_by_name(patterns: list[str], names: list[str]) -> None:
    assert [measurement.name for measurement in select(patterns)] == names


def test_names_are_unique_and_quantiles_have_enough_values_below_them() -> None:
    rows = [row.name for measurement in MEASUREMENTS for row in measurement.rows]
    assert len(set(rows)) == len(rows)
    assert EMULATED.exchanges >= 100 <= EMULATED.connects
