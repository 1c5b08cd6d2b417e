"""How far a copy is: numbers that whoever copies counts up, and that another thread looks at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Gauge:
    """Sizes in bytes. ``size`` went over; ``kept`` did not need to (it was there, or is a hole).

    ``read`` is how much of what is there was compared. ``total`` is what there is in all, as far as it is known.
    ``part`` is how much of the file that is at it will still be there if the copy is cut off now.
    """

    files: int = 0
    path: str = ""
    size: int = 0
    kept: int = 0
    read: int = 0
    total: int | None = None
    part: int = 0

    @property
    def done(self) -> int:
        return self.size + self.kept

    def at(self, path: str) -> None:
        """This comes now."""
        self.files += 1
        self.path = path
        self.part = 0

    def moved(self, size: int, *, stays: bool) -> None:
        """So much more went over, and is not lost if ``stays``."""
        self.size += size
        self.part += size if stays else 0

    def had(self, size: int) -> None:
        self.kept += size

    def compared(self, size: int) -> None:
        self.read += size
