"""Codecs by which bytes become fewer on a long way: zstd if the system has its library, zlib, which every Python has.

The law: what comes out of a decompressor is as long as it was said to be, or a ``ValueError``; it never takes more
memory than its window (512 KiB) and one block. Each pair is one stream of blocks, where every block refers to those
before it: of lists of names in pieces of 1 KiB 4.1 times as much gets through as with blocks that stand alone.

One core, sources of Python in pieces of 128 KiB, while others used the machine: zstd of level 1 took 80 to 110 MB/s
and made 4.0 times less of them, level 3 58 and 4.5, zlib of level 1 54 and 3.6, of level 6 (what ssh has) 20 and 4.4.
Random bytes: 1,600, 1,400, 27 and 22 MB/s.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
import zlib
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Final, NamedTuple, Protocol

MAX_BLOCK: Final = 256 * 1024
"""Bytes of a block before it is packed: the longest record there is (``resync``) is one block."""

MOST_PACKED: Final = MAX_BLOCK + 4096
"""Bytes of a packed block: what does not become less becomes a little more."""

_LEVEL: Final = 1
_WINDOW_LOG: Final = 19  # what level 1 takes by itself
_OLDEST: Final = 1_04_00
"""zstd 1.4.0 (2019): the functions below are in all libraries from then on."""


class Compressor(Protocol):
    def compress(self, data: bytes) -> bytes:
        """All of ``data``, at most ``MAX_BLOCK`` bytes, packed so that the other side can have it at once."""


class Decompressor(Protocol):
    def decompress(self, data: bytes, size: int) -> bytes:
        """The ``size`` bytes, at most ``MAX_BLOCK``, that ``data`` stands for. Raises ``ValueError`` if it does not."""


class Codec(NamedTuple):
    name: str
    compressor: Callable[[], Compressor]
    decompressor: Callable[[], Decompressor]


@functools.cache
def codecs() -> dict[str, Codec]:
    """What this machine has, by name, the best first."""
    found = [Codec("zlib", _ZlibCompressor, _ZlibDecompressor)]
    if (library := _zstd()) is not None:
        zstd = library
        found.insert(0, Codec("zstd", lambda: _ZstdCompressor(zstd), lambda: _ZstdDecompressor(zstd)))
    return {codec.name: codec for codec in found}


class _ZlibCompressor:
    def __init__(self) -> None:
        self._stream = zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS)

    def compress(self, data: bytes) -> bytes:
        return self._stream.compress(data) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class _ZlibDecompressor:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS)

    def decompress(self, data: bytes, size: int) -> bytes:
        try:
            found = self._stream.decompress(data, size + 1)
        except zlib.error as error:
            raise ValueError(f"zlib: {error}") from error
        # With room for one byte more it keeps nothing back.
        if len(found) != size or self._stream.unconsumed_tail or self._stream.eof:
            raise ValueError(f"zlib: not the {size} bytes that it was said to be")
        return found


# --- zstd, by the system's library (zstd.h) ----------------------------------------------------------------

_C_LEVEL: Final = 100  # ZSTD_c_compressionLevel
_C_WINDOW_LOG: Final = 101  # ZSTD_c_windowLog
_D_WINDOW_LOG_MAX: Final = 100  # ZSTD_d_windowLogMax
_FLUSH: Final = 1  # ZSTD_e_flush


class _In(Structure):
    """ZSTD_inBuffer."""

    _fields_ = (("src", c_char_p), ("size", c_size_t), ("pos", c_size_t))


class _Out(Structure):
    """ZSTD_outBuffer."""

    _fields_ = (("dst", c_void_p), ("size", c_size_t), ("pos", c_size_t))


def _zstd() -> ctypes.CDLL | None:
    """The library with its prototypes, or None. Linux has it wherever dpkg, rpm, pacman or systemd is; macOS if
    Homebrew or MacPorts have brought it."""
    if sys.platform == "darwin":
        names = [
            "/opt/homebrew/lib/libzstd.dylib",
            "/usr/local/lib/libzstd.dylib",
            "/opt/local/lib/libzstd.dylib",
        ]
    else:
        names = ["libzstd.so.1"]
    for name in names:
        try:
            return _declared(ctypes.CDLL(name))
        except (OSError, AttributeError):
            continue
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Raises ``AttributeError`` for one that lacks something."""
    prototypes = {
        "ZSTD_versionNumber": (c_uint, []),
        "ZSTD_isError": (c_uint, [c_size_t]),
        "ZSTD_getErrorName": (c_char_p, [c_size_t]),
        "ZSTD_createCCtx": (c_void_p, []),
        "ZSTD_freeCCtx": (c_size_t, [c_void_p]),
        "ZSTD_CCtx_setParameter": (c_size_t, [c_void_p, c_int, c_int]),
        "ZSTD_compressStream2": (c_size_t, [c_void_p, POINTER(_Out), POINTER(_In), c_int]),
        "ZSTD_createDCtx": (c_void_p, []),
        "ZSTD_freeDCtx": (c_size_t, [c_void_p]),
        "ZSTD_DCtx_setParameter": (c_size_t, [c_void_p, c_int, c_int]),
        "ZSTD_decompressStream": (c_size_t, [c_void_p, POINTER(_Out), POINTER(_In)]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.ZSTD_versionNumber() < _OLDEST:
        raise AttributeError("a libzstd before 1.4.0")
    return library


class _ZstdCompressor:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._context = _context(self, library.ZSTD_createCCtx, library.ZSTD_freeCCtx)
        for parameter, value in ((_C_LEVEL, _LEVEL), (_C_WINDOW_LOG, _WINDOW_LOG)):
            _checked(library, library.ZSTD_CCtx_setParameter(self._context, parameter, value))
        self._room = ctypes.create_string_buffer(MOST_PACKED)

    def compress(self, data: bytes) -> bytes:
        source, packed, left = _In(data, len(data), 0), b"", 1
        address = ctypes.addressof(self._room)
        while left:
            target = _Out(address, MOST_PACKED, 0)
            left = self._library.ZSTD_compressStream2(
                self._context, ctypes.byref(target), ctypes.byref(source), _FLUSH
            )
            _checked(self._library, left)
            packed += ctypes.string_at(address, target.pos)
        return packed


class _ZstdDecompressor:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._context = _context(self, library.ZSTD_createDCtx, library.ZSTD_freeDCtx)
        _checked(library, library.ZSTD_DCtx_setParameter(self._context, _D_WINDOW_LOG_MAX, _WINDOW_LOG))
        self._room = ctypes.create_string_buffer(MAX_BLOCK + 1)

    def decompress(self, data: bytes, size: int) -> bytes:
        address = ctypes.addressof(self._room)
        # With room for one byte more it keeps nothing back.
        source, target = _In(data, len(data), 0), _Out(address, min(size, MAX_BLOCK) + 1, 0)
        before = (-1, -1)
        while source.pos < source.size and before != (source.pos, target.pos):
            before = (source.pos, target.pos)
            outcome = self._library.ZSTD_decompressStream(
                self._context, ctypes.byref(target), ctypes.byref(source)
            )
            _checked(self._library, outcome)
        if target.pos != size or source.pos != source.size:
            raise ValueError(f"zstd: not the {size} bytes that it was said to be")
        return ctypes.string_at(address, size)


def _context(owner: object, create: Callable[[], int | None], free: Callable[[int], int]) -> int:
    """One that goes with ``owner``."""
    if not (context := create()):
        raise MemoryError
    weakref.finalize(owner, free, context).atexit = False
    return context


def _checked(library: ctypes.CDLL, outcome: int) -> None:
    if library.ZSTD_isError(outcome):
        raise ValueError(f"zstd: {library.ZSTD_getErrorName(outcome).decode()}")
