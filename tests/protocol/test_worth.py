from __future__ import annotations

from collections import deque

from protocol.worth import ACKNOWLEDGED, FIRST_SKIP, LEAST, MOST_SKIPPED, SAMPLE, TRIAL_EVERY, Worth

PIECE = 128 * 1024


class Line:
    """Pieces that follow each other without a pause over a way of ``rate`` bytes a second, with a codec of ``speed``."""

    def __init__(self, rate: float, speed: float, ratio: float = 4.0) -> None:
        self.worth = Worth()
        self.rate, self.speed, self.ratio = rate, speed, ratio
        self.now = self.free = 0.0
        self.packed = self.pieces = 0
        self.under_way: deque[tuple[float, int]] = deque()

    def carry(self, size: int) -> None:
        """The codec and the way work at the same time; there is room for eight pieces between them."""
        for _ in range(size // PIECE):
            sent = PIECE
            self.now += 0.00001
            self.pieces += 1
            if self.worth.wants(PIECE):
                self.packed += 1
                seconds = PIECE / self.speed
                self.now += seconds
                sent = int(PIECE / self.ratio)
                self.worth.packed(PIECE, sent, seconds)
            self.worth.sent(sent, self.now)
            self.free = max(self.free, self.now) + sent / self.rate
            self.under_way.append((self.free, sent))
            if len(self.under_way) > 8:
                self.now = max(self.now, self.under_way[0][0])
            while self.under_way and self.under_way[0][0] <= self.now:
                when, size = self.under_way.popleft()
                assert self.worth.acknowledged(size, when)


def test_a_slow_way_is_packed_always() -> None:
    line = Line(rate=2e6, speed=100e6)
    line.carry(64 << 20)
    assert line.packed == line.pieces
    assert line.worth.way is not None
    assert 1.5e6 < line.worth.way < 2.5e6


def test_a_way_that_is_faster_than_the_codec_is_left_alone() -> None:
    line = Line(rate=1e9, speed=100e6)
    line.carry(64 << 20)
    assert line.worth.is_off
    assert line.packed < line.pieces / 10


def test_it_is_packed_again_on_a_way_that_has_become_slow() -> None:
    line = Line(rate=1e9, speed=100e6)
    line.carry(16 << 20)
    assert line.worth.is_off
    line.rate = 5e6
    line.carry(16 << 20)
    assert not line.worth.is_off


def test_on_a_way_of_medium_speed_looks_are_seldom() -> None:
    line = Line(rate=40e6, speed=100e6)
    line.carry(4 * TRIAL_EVERY)
    assert not line.worth.is_off
    assert line.packed > line.pieces * 0.97


def test_what_is_small_is_not_packed() -> None:
    worth = Worth()
    assert not worth.wants(LEAST - 1)
    assert worth.wants(LEAST)


def test_what_does_not_shrink_is_tried_again_ever_more_seldom_and_what_does_ends_that() -> None:
    worth = Worth()
    skipped = []
    for _ in range(5):
        assert worth.wants(4096)
        worth.packed(4096, 4100, 0.0)
        count = 0
        while not worth.wants(4096):
            count += 4096
        skipped.append(count)
        worth._skip = 0
    assert skipped == [FIRST_SKIP, 2 * FIRST_SKIP, MOST_SKIPPED, MOST_SKIPPED, MOST_SKIPPED]
    worth.packed(4096, 1000, 0.0)
    worth.packed(4096, 4100, 0.0)
    assert not worth.wants(FIRST_SKIP)
    assert worth.wants(4096)


def test_a_pause_does_not_count() -> None:
    worth = Worth()
    for start in (0.0, 1000.0):
        worth.sent(SAMPLE, start)
        assert worth.acknowledged(SAMPLE, start + 0.1)
        worth.sent(ACKNOWLEDGED - 1, start + 0.1)  # which is not acknowledged
    assert worth.way is not None
    assert round(worth.way / 1e6, 1) == 2.6


def test_more_is_acknowledged_than_was_sent() -> None:
    worth = Worth()
    worth.sent(100, 0.0)
    assert worth.acknowledged(100, 0.1)
    assert not worth.acknowledged(1, 0.1)
