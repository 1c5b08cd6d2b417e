"""What happens to an instance, in order: remembered for those who come late, sent to those who listen."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from protocol.api import Event

logger = logging.getLogger(__name__)

#: Events of the current start that a late subscriber is still told: a start makes about 20.
MAX_REMEMBERED = 256

Listener = Callable[[Event], None]


class EventLog:
    """Publishes events to the log and to every listener; listeners must not wait."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._remembered: deque[Event] = deque(maxlen=MAX_REMEMBERED)
        self._listeners: list[Listener] = []

    def begin(self) -> None:
        """A start begins: what was of the one before is not told to those who come late."""
        self._remembered.clear()

    def say(self, kind: str, message: str, **fields: str) -> None:
        """Publish an event of now."""
        self.publish(Event(self._clock(), kind, message, fields))

    def publish(self, event: Event) -> None:
        logger.info(
            "%s: %s%s", event.kind, event.message, "".join(f" {k}={v}" for k, v in event.fields.items())
        )
        self._remembered.append(event)
        for listener in tuple(self._listeners):
            listener(event)

    def subscribe(self, listener: Listener) -> list[Event]:
        """Call ``listener`` with every event from now on; what was remembered until now is returned."""
        self._listeners.append(listener)
        return list(self._remembered)

    def unsubscribe(self, listener: Listener) -> None:
        """Stop calling ``listener``; no harm if it never subscribed."""
        if listener in self._listeners:
            self._listeners.remove(listener)
