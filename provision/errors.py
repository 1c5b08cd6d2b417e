"""The one error of this package: a sentence for the user, and what to do about it."""

from __future__ import annotations


class ProvisionError(Exception):
    """The image could not be built or read. ``hint`` is what the user can do, or empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
