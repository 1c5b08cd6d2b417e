"""Host and guest change one tree at random, other processes of the guest look at it: nothing stale is seen, nor stays.

What is judged while it goes on, and how, ``coherence`` says. After each round everything is compared: names, attributes,
data, through the caches of the guest's kernel as they then are. Again: AGENTCTL_STORM_SEED=... pytest ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.files import looker, storm
from tests.files.coherence import LAW_ORDER, LAW_SENTINEL, LAW_TIME, Account, Changed, Judge
from tests.files.harness import Plane
from tests.files.sight import Sight, differences
from tests.files.storm import SENTINEL, Configuration

DIRECTORIES = 3
SLOTS = 6
NAMES = [f"{directory}/{slot}" for directory in range(DIRECTORIES) for slot in [*range(SLOTS), SENTINEL]]

GRACES = {LAW_TIME: 2_000_000_000, LAW_ORDER: 500_000_000, LAW_SENTINEL: 500_000_000}
"""ns. Milliseconds are usual; what stays stale does so for ever, or until the name changes again."""

LIMIT = 20.0
"""Seconds for the guest to see the last change of a round."""


def new_seed() -> int:
    return int(os.environ.get("AGENTCTL_STORM_SEED") or random.SystemRandom().randrange(1 << 32))


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What came of one. ``left``: how the guest's tree still differed from the host's once all was quiet."""

    account: Account
    stale: list[str]
    left: list[str]

    @property
    def complaints(self) -> list[str]:
        return [*self.account.wrong, *self.stale, *self.left]


class Storm:
    """Rounds of it on one plane."""

    def __init__(
        self, plane: Plane, seed: int, graces: dict[str, int] = GRACES, limit: float = LIMIT
    ) -> None:
        self._plane = plane
        self._limit = limit
        self._random = random.Random(seed)
        self._graces = graces
        self._top = plane.host / "storm"
        self._work = plane.directory / "storm"
        self._work.mkdir()
        (self._work / "locks").touch()
        for directory in range(DIRECTORIES):
            (self._top / f"{directory}").mkdir(parents=True)
            (self._top / f"{directory}/{SENTINEL}").write_bytes(b"%016d" % 1)

    def run(self, sight: Sight, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> Round:
        account = Account()
        for slot in NAMES:
            account.changes.append(Changed(slot, 0, 0, storm.truth(str(self._top / slot))))
        for process in self._start(seconds, meanwhile):
            account.add(json.loads(process.read_text()), NAMES)
        left = self._wait_quiet(sight)
        left += differences(sight.tree("storm"), looker.tree(str(self._top)))
        stale = Judge(account.changes, self._graces).judge(account.looks)
        return Round(account, [str(one) for one in stale], left)

    def _start(self, seconds: float, meanwhile: Callable[[], object]) -> list[Path]:
        """Two processes of the host, four of the guest; their logs."""
        configurations = [self._configuration(number, seconds) for number in range(6)]
        with contextlib.ExitStack() as stack:
            hosts = [
                subprocess.Popen(self._command(one), start_new_session=True)
                for one in configurations
                if one.number < 2
            ]
            for process in hosts:
                stack.callback(process.wait)
                stack.callback(process.kill)
            guests = [
                stack.enter_context(self._plane.start(self._command(one)))
                for one in configurations
                if one.number >= 2
            ]
            meanwhile()
            for guest in guests:
                finished = guest.wait(seconds + 120)
                assert finished.status == 0, finished.errors[-4000:]
            for process in hosts:
                assert process.wait(60) == 0
        return [Path(one.log) for one in configurations]

    def _configuration(self, number: int, seconds: float) -> Configuration:
        on_host = number < 2
        return Configuration(
            top=str(self._top if on_host else self._plane.guest / "storm"),
            truth=str(self._top),
            locks=str(self._work / "locks"),
            log=str(self._work / f"log{number}"),
            number=number + 1,
            seed=self._random.randrange(1 << 32),
            seconds=seconds,
            directories=DIRECTORIES,
            slots=SLOTS,
            pause=0.004 if on_host else 0.001,
            changing=1.0 if on_host else 0.04 * (number % 2),
            looking=not on_host,
            sentinels=number == 0,
            fence="" if on_host else str(self._plane.agent.fence),
        )

    @staticmethod
    def _command(configuration: Configuration) -> list[str]:
        return [
            sys.executable,
            "-B",
            str(Path(storm.__file__)),
            json.dumps(dataclasses.asdict(configuration)),
        ]

    def _wait_quiet(self, sight: Sight) -> list[str]:
        """Until the guest has seen a change of each directory, and then one more, which came after all others; where
        it has not."""
        unseen = []
        for _ in range(2):
            said = b"%016d" % self._random.randrange(10**15)
            for directory in range(DIRECTORIES):
                storm.pwrite(str(self._top / f"{directory}/{SENTINEL}"), said)
            for directory in range(DIRECTORIES):
                name = f"storm/{directory}/{SENTINEL}"
                end = time.monotonic() + self._limit
                while sight.look(name).get("content") != said.decode():
                    if time.monotonic() > end:
                        unseen.append(f"{name} is not seen {self._limit:g} s after it was written")
                        break
                    time.sleep(0.002)
        return unseen


@pytest.fixture
def plane() -> Iterator[Plane]:
    with Plane() as plane:
        yield plane


def judge(rounds: list[Round], seed: int) -> None:
    complaints = [line for one in rounds for line in one.complaints]
    again = f"again with AGENTCTL_STORM_SEED={seed}"
    assert not complaints, "\n".join([f"{len(complaints)} complaints; {again}", *complaints[:40]])
    looks = sum(len(one.account.looks) for one in rounds)
    changes = sum(len(one.account.changes) for one in rounds)
    assert looks > 100
    assert changes > 100


def test_nothing_stale_is_seen_in_a_storm(plane: Plane, long: bool) -> None:
    seed = new_seed()
    storm = Storm(plane, seed)
    with plane.sight() as sight:
        rounds = [storm.run(sight, 3 if long else 1.5) for _ in range(60 if long else 4)]
    judge(rounds, seed)


def test_nothing_stale_is_seen_where_servers_are_killed(plane: Plane, long: bool) -> None:
    seed = new_seed()
    patient = dict.fromkeys(GRACES, 15_000_000_000)
    storm = Storm(plane, seed, patient)
    kills = [plane.restart_server, plane.restart_agent]

    def kill() -> None:
        time.sleep(0.7)
        kills[len(rounds) % len(kills)]()
        time.sleep(0.3)

    rounds: list[Round] = []
    with plane.sight() as sight:
        for _ in range(20 if long else 2):
            rounds.append(storm.run(sight, 2, kill))
    judge(rounds, seed)


def test_a_lost_word_does_not_go_unnoticed() -> None:
    """An agent that misses each fourth message with which promises are taken back: the judge must not be content."""
    rounds: list[Round] = []
    with Plane(losing=4) as plane, plane.sight() as sight:
        storm = Storm(plane, 1, limit=2)
        while len(rounds) < 16 and not (any(one.left for one in rounds) and any(one.stale for one in rounds)):
            rounds.append(storm.run(sight, 1.5))
    assert any(one.stale for one in rounds), "nobody noticed while it went on"
    assert any(one.left for one in rounds), "the trees were alike in the end"
