"""What the agents and the command line say to each other.

From the bottom up: ``codec`` and ``frames`` (bytes to values), ``messages`` (values to typed frames),
``window``, ``rpc`` and ``stream`` (the rules of one conversation), ``session`` (all of them on one
link), ``resync`` (sessions on a pipe without connections). ``api`` holds what is said, ``execio`` what
an exec stream carries. All of these are sans-IO: bytes in, events out, time and randomness are
arguments. ``treecopy`` is what a copy of files carries, ``treesend`` and ``treereceive`` are its ends, which read and
write files. ``link`` drives a session over a trio stream, with ``muxstream``, ``service`` and ``serving``
as its parts, ``serial`` drives ``resync``, and ``splice`` joins streams; only these import trio.
"""

from __future__ import annotations

from typing import Final

# Sides with different majors refuse each other. A minor only ever adds messages and trailing fields.
PROTOCOL_MAJOR: Final = 2
PROTOCOL_MINOR: Final = 0
