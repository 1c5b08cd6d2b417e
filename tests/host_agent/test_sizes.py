from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import sizes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4", 4 * GIB),
        ("4g", 4 * GIB),
        ("4G", 4 * GIB),
        ("4GB", 4 * GIB),
        (" 4 GiB ", 4 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("512M", 512 << 20),
        ("512mib", 512 << 20),
        ("2t", 2 << 40),
        ("16k", 16 << 10),
        ("100b", 100),
        ("0", 0),
    ],
)
def test_sizes_people_write(text: str, size: int) -> None:
    assert sizes.parse(text) == size


@pytest.mark.parametrize(
    "text", ["", "-4", "four", "4 5", "4x", "1e9", "0x10", "4iB", "nan", "inf", "٤ GiB x"]
)
def test_what_is_no_size_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write it like"):
        sizes.parse(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 30 + "t"])
def test_a_size_beyond_all_numbers_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="more than any machine has"):
        sizes.parse(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (512 << 20, "512 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (GIB - 1, "1 GiB"),
        (60 * GIB, "60 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_people_read(size: int, text: str) -> None:
    assert sizes.show(size) == text


def test_a_flag_in_a_hint_is_short_where_it_can_be() -> None:
    assert sizes.flag(60 * GIB) == "60GiB"
    assert sizes.flag(512 << 20) == "512MiB"
    assert sizes.flag(GIB + 1) == f"{GIB + 1}B"


@given(st.integers(min_value=0, max_value=1 << 52))
def test_a_flag_is_read_back_exactly(size: int) -> None:
    assert sizes.parse(sizes.flag(size)) == size
