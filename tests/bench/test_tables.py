from __future__ import annotations

import pytest

from tests.bench.tables import aligned, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.56, "1235"),
        (99.96, "100."),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.1, "0.100"),
        (0.00123, "0.0012"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(value: float, text: str) -> None:
    assert significant(value) == text


def test_names_are_flush_left_and_numbers_right() -> None:
    assert aligned([["name", "s"], ["x", "10.5"]]) == ["name     s", "x     10.5"]
