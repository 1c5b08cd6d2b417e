from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import processes
from tests.bench.files import freshness, watcher
from tests.bench.files.freshness import Clock, Watcher, between, compare_clocks, edit, measure, percentile


def started(script: str) -> Callable[[], subprocess.Popen[bytes]]:
    return lambda: processes.spawn(
        [sys.executable, "-u", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def real() -> Watcher:
    return Watcher(started(Path(watcher.__file__).read_text()))


def test_the_quickest_question_says_how_clocks_differ() -> None:
    ours = itertools.chain([0.0, 1.0, 10.0, 10.2], itertools.count(20.0))
    theirs = itertools.chain([100.9, 110.1], itertools.repeat(0.0))
    clock = compare_clocks(lambda: next(theirs), lambda: next(ours))
    assert clock.ahead == pytest.approx(100.0)
    assert clock.doubt == pytest.approx(0.1)


def test_a_clock_that_drifts_leaves_more_doubt() -> None:
    clock = between(Clock(5.0, 0.1), Clock(5.4, 0.2))
    assert clock.ahead == pytest.approx(5.2)
    assert clock.doubt == pytest.approx(0.4)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1000, 0, -1)]
    assert percentile(values, 0.5) == 500.0
    assert percentile(values, 0.99) == 990.0
    assert percentile([3.0], 0.99) == 3.0


@pytest.mark.parametrize("replace", [False, True])
def test_an_edit(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    number = path.stat().st_ino
    assert edit(path, "other", replace=replace) > 0
    assert path.read_text() == "other"
    assert (path.stat().st_ino != number) is replace
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_edits_are_seen(tmp_path: Path) -> None:
    with real() as process:
        found = measure("plain", tmp_path / "edited", str(tmp_path / "edited"), process, 45, 60)
    assert (found.peer, found.edits, found.error) == ("plain", 45, "")
    assert -found.doubt <= found.p50 <= found.p99 <= found.worst < 1
    assert 0 < found.doubt < 1


def test_a_clock_that_is_ahead_is_no_delay(tmp_path: Path) -> None:
    script = Path(watcher.__file__).read_text()
    script = script.replace(
        "import time\n", "import time\nreal = time.monotonic\ntime.monotonic = lambda: real() + 500\n"
    )
    with Watcher(started(script)) as process:
        found = measure("plain", tmp_path / "edited", str(tmp_path / "edited"), process, 25, 60)
    assert -found.doubt <= found.p50 <= found.worst < 1


def test_what_takes_too_long_ends_in_fewer_edits(tmp_path: Path) -> None:
    with real() as process:
        found = measure("plain", tmp_path / "edited", str(tmp_path / "edited"), process, 100_000, 2)
    assert not found.error
    assert 0 < found.edits < 10_000


def test_an_edit_that_is_not_seen_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freshness, "EDIT_TIMEOUT", 0.05)
    (tmp_path / "elsewhere").mkdir()
    with real() as process:
        found = measure("blind", tmp_path / "edited", str(tmp_path / "elsewhere"), process, 5, 60)
    assert (found.edits, found.error) == (0, "not seen within 0.05 s")


def test_a_watcher_that_ends_is_an_error(tmp_path: Path) -> None:
    script = f"import sys; sys.stdin.readline(); print({json.dumps(json.dumps({'clock': 1.0}))})"
    with Watcher(started(script)) as process:
        found = measure("gone", tmp_path / "edited", str(tmp_path / "edited"), process, 5, 60)
    assert "ended" in found.error or "Broken pipe" in found.error
