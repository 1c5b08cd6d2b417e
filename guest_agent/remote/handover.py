"""What is said when stdio is handed over, and what is answered: one line each.

``agentctl-stdio 1 BUILD GRACE`` comes with two descriptors, to read from and to write to, in one message (SCM_RIGHTS,
unix(7)). The answer ``taken`` means that they are used; the connection stays open for as long as they are, and who
closes it ends that. ``other-build`` means that this daemon is not what was asked for, and ends to make room;
``refused`` that something is wrong, which follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_LINE: Final = 512

TAKEN: Final = b"taken\n"
OTHER_BUILD: Final = b"other-build\n"
REFUSED: Final = b"refused "

_WORD: Final = "agentctl-stdio"
_FORMAT: Final = "1"


@dataclass(frozen=True, slots=True)
class Offer:
    """Stdio from a connector of the build ``build``, after whose end another is waited for ``grace`` seconds."""

    build: str
    grace: float

    def encode(self) -> bytes:
        return f"{_WORD} {_FORMAT} {self.build} {self.grace!r}\n".encode()

    @classmethod
    def decode(cls, line: bytes) -> Offer:
        """Raises ``ValueError``."""
        match line.decode("ascii", "replace").split():
            case [word, number, build, grace] if (word, number) == (_WORD, _FORMAT):
                return cls(build, parse_grace(grace))
        raise ValueError(f"not an offer: {line[:80]!r}")


def parse_grace(text: str) -> float:
    """Seconds; ``inf`` is for ever. Raises ``ValueError``."""
    seconds = float(text)
    if not seconds >= 0:  # and a NaN is not, either
        raise ValueError(f"{text} is not a time to wait")
    return seconds
