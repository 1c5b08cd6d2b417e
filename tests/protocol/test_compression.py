from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from protocol import compression
from protocol.compression import MAX_BLOCK, MOST_PACKED, codecs

TEXT = b"".join(b"%d: the same again and again\n" % number for number in range(20_000))[:MAX_BLOCK]
NOISE = random.Random(3).randbytes(MAX_BLOCK)


@pytest.fixture
def anew() -> Iterator[None]:
    codecs.cache_clear()
    yield
    codecs.cache_clear()


@pytest.mark.parametrize("name", sorted(codecs()))
def test_blocks_come_one_by_one_and_in_order(name: str) -> None:
    compressor, decompressor = codecs()[name].compressor(), codecs()[name].decompressor()
    for data in (b"a", TEXT, NOISE, bytes(MAX_BLOCK), b"b", TEXT):
        packed = compressor.compress(data)
        assert len(packed) <= MOST_PACKED
        assert decompressor.decompress(packed, len(data)) == data


@pytest.mark.parametrize("name", sorted(codecs()))
def test_what_is_cut_short_is_an_error(name: str) -> None:
    packed = codecs()[name].compressor().compress(NOISE[:10_000])
    with pytest.raises(ValueError):
        codecs()[name].decompressor().decompress(packed[:9_999], 10_000)


@pytest.mark.parametrize("name", sorted(codecs()))
def test_what_follows_is_an_error(name: str) -> None:
    packed = codecs()[name].compressor().compress(TEXT[:10_000])
    with pytest.raises(ValueError):
        codecs()[name].decompressor().decompress(packed + packed, 10_000)


def test_a_window_that_takes_more_memory_is_refused() -> None:
    library = compression._zstd()
    if library is None:
        pytest.skip("no libzstd")
    compressor = compression._ZstdCompressor(library)
    library.ZSTD_CCtx_setParameter(compressor._context, compression._C_WINDOW_LOG, 24)
    packed = compressor.compress(TEXT)
    with pytest.raises(ValueError, match="memory"):
        codecs()["zstd"].decompressor().decompress(packed, len(TEXT))


@pytest.mark.usefixtures("anew")
def test_without_the_library_there_is_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert list(codecs()) == ["zlib"]


@pytest.mark.usefixtures("anew")
def test_a_library_that_lacks_something_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert list(codecs()) == ["zlib"]


def test_a_library_that_is_too_old_is_none() -> None:
    class Old:
        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(__call__=None) if name != "ZSTD_versionNumber" else _Version()

    with pytest.raises(AttributeError, match=r"1\.4\.0"):
        compression._declared(Old())  # type: ignore[arg-type]


class _Version:
    restype: Any = None
    argtypes: Any = None

    def __call__(self) -> int:
        return 1_03_08
