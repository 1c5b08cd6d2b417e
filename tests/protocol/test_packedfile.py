from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import packedfile
from protocol.errors import DecodeError

pytestmark = pytest.mark.skipif(not packedfile.is_there(), reason="no libzstd")

TEXT = b"".join(b"%d: the same again and again\n" % number for number in range(20_000))
NOISE = random.Random(4).randbytes(400_000)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from([TEXT, NOISE, bytes(300_000)]), st.integers(1, 300_000), st.booleans()),
        max_size=6,
    ),
    st.sampled_from([1, 1000, 70_000, -1]),
)
def test_what_is_written_is_read(said: list[tuple[bytes, int, bool]], piece: int) -> None:
    if piece == 1:
        said = [(source, min(size, 3000), flush) for source, size, flush in said]
    out, into = os.pipe()

    def write() -> None:
        with packedfile.writer(into) as file:
            for source, size, flush in said:
                file.write(source[:size])
                if flush:
                    file.flush()

    writing = threading.Thread(target=write)
    writing.start()
    found = []
    with packedfile.reader(out) as file:
        while data := file.read(piece):
            found.append(data)
    writing.join()
    assert b"".join(found) == b"".join(source[:size] for source, size, _ in said)


def test_what_is_flushed_is_there(tmp_path: Path) -> None:
    out, into = os.pipe()
    with packedfile.reader(out) as reader, packedfile.writer(into) as writer:
        for data in (b"a question", TEXT[:5000], b"?"):
            writer.write(data)
            writer.flush()
            assert reader.read(len(data)) == data


@pytest.mark.parametrize("said", [b"\xff\0\0\0", b"\2\0\0\6\0\0\0\1xx", b"\4\0\0\4\0\0\0\1"])
def test_what_cannot_be_right(said: bytes, tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(said)
    with packedfile.reader(os.open(tmp_path / "said", os.O_RDONLY)) as file, pytest.raises(DecodeError):
        file.read(1)


def test_it_is_closed_once(tmp_path: Path) -> None:
    file = packedfile.writer(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT), closefd=True)
    file.write(TEXT)
    file.close()
    file.close()
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with packedfile.reader(descriptor, closefd=False) as reader:
        assert reader.read() == TEXT
    os.close(descriptor)
    assert (tmp_path / "file").stat().st_size < len(TEXT) / 3
