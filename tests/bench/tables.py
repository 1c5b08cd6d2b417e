"""Numbers and columns as people read them."""

from __future__ import annotations


def significant(value: float) -> str:
    """Three digits that mean something: 12.3, 1.23, 0.123, 0.00123."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 0.1:
        return f"{value:#.3g}"
    return f"{value:.4f}"


def factor(value: float | None) -> str:
    """A ratio, or that there is none."""
    return "-" if value is None else f"{significant(value)}x"


def aligned(rows: list[list[str]]) -> list[str]:
    """A line for each of ``rows``: the first column flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
