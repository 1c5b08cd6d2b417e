"""What the host agent and the process of its view say to each other.

An ordinary link over a socket pair: the view is ``Role.SERVER``. The end of the link is the end of the view.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from protocol.api import Notice, Request, ViewPlace


@dataclass(frozen=True, slots=True)
class ViewState:
    """``mounted``: it can be looked at. ``connected``: the guest answers. ``reason``: a sentence, why it cannot be."""

    mounted: bool = False
    connected: bool = False
    reason: str = ""
    places: list[ViewPlace] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GetViewState(Request[ViewState]):
    METHOD: ClassVar[str] = "view-state"
    REPLY: ClassVar[type] = ViewState


@dataclass(frozen=True, slots=True)
class ViewChanged(Notice):
    """Sent when anything of it has changed."""

    TOPIC: ClassVar[str] = "view-changed"

    state: ViewState
