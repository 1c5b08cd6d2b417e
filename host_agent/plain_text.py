"""What a log says, as text: its control sequences taken out."""

from __future__ import annotations

import codecs
from enum import Enum, auto


class _State(Enum):
    """Where in a control sequence the next character is."""

    TEXT = auto()
    ESCAPE = auto()  # after ESC
    SEQUENCE = auto()  # after CSI: parameters until a letter
    STRING = auto()  # after OSC, DCS and the like: a title or worse, until ST or BEL


# ECMA-48, 5.3 (C1) and 8.3: what begins a sequence, as ESC and a letter and as one character.
_CSI, _CSI_C1 = "[", "\x9b"
_STRINGS, _STRINGS_C1 = "]PX^_", "\x9d\x90\x98\x9e\x9f"
_STRING_ENDS = "\x07\x9c"


class PlainText:
    """Sans-IO: a log's bytes in, its text out; any split of the bytes gives the same text.

    Control sequences go without a trace, since a boot is full of colours, and so do other control characters
    but newlines and tabs. What else is not printable, such as a bidirectional override, is shown as its
    escape. A newline ends every sequence: one that is left open hides the rest of its line and no more.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._state = _State.TEXT

    def receive_data(self, data: bytes) -> str:
        """The text that ``data`` adds."""
        return "".join(map(self._character, self._decoder.decode(data)))

    def _character(self, character: str) -> str:
        if character == "\n":
            self._state = _State.TEXT
            return character
        if character == "\x1b":
            self._state = _State.ESCAPE
            return ""
        if self._state is not _State.TEXT and self._is_in_sequence(character):
            return ""
        return self._text(character)

    def _is_in_sequence(self, character: str) -> bool:
        """Whether the sequence takes ``character``; one that cannot be part of it ends it and is text."""
        match self._state:
            case _State.STRING:
                if character in _STRING_ENDS:
                    self._state = _State.TEXT
                return True
            case _State.ESCAPE if character == _CSI:
                self._state = _State.SEQUENCE
                return True
            case _State.ESCAPE if character in _STRINGS:
                self._state = _State.STRING
                return True
            case _State.ESCAPE:
                more, last = " " <= character <= "/", "0" <= character <= "~"
            case _:
                more, last = " " <= character <= "?", "@" <= character <= "~"
        if not more:
            self._state = _State.TEXT
        return more or last

    def _text(self, character: str) -> str:
        if character.isprintable() or character == "\t":
            return character
        if character == _CSI_C1:
            self._state = _State.SEQUENCE
        elif character in _STRINGS_C1:
            self._state = _State.STRING
        if character < "\x20" or "\x7f" <= character <= "\x9f":
            return ""
        return character.encode("unicode_escape").decode()
