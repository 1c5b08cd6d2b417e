"""Asks dockerd (or podman, which answers like it) what there is, and hears when that has changed.

The laws: what was asked of something that never changes (the layers of a container, of an image) is not asked again;
one answer that makes no sense costs one place, not all; and where no dockerd answers there is nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import trio

from guest_agent import dockerd
from guest_agent.view import places
from guest_agent.view.places import MALFORMED, RUNNING, Layers, Place

log = logging.getLogger(__name__)

PATIENCE: Final = 10.0
"""Seconds for each word of dockerd's: an emulated one that pulls an image takes some for a list."""

MAX_ANSWER: Final = 16 << 20
"""Bytes; a container takes 1 to 2 KB in a list, an image less than 1."""

EVENTS: Final = (
    "create", "start", "die", "destroy", "rename", "pull", "tag", "untag", "delete", "import", "load", "remove",
    "mount", "unmount",
)  # fmt: skip
"""Those after which there may be something else to see; the health checks of containers are most of all others."""

_TASKS: Final = "/run/containerd/io.containerd.runtime.v2.task/moby/{}/rootfs"
"""Where containerd has mounted the root filesystem of a container of Docker's that runs."""


class NoDocker(Exception):
    """Nobody answers, or refuses."""


def is_mount(path: str) -> bool:
    """Whether something is mounted there that we may enter."""
    return os.path.ismount(path) and os.access(path, os.R_OK | os.X_OK)


class Docker:
    """The one behind ``address``. Blocks: for a worker thread, one at a time."""

    def __init__(self, address: Path, mounted: Callable[[str], bool] = is_mount) -> None:
        self.address = address
        self._mounted = mounted
        self._layers: dict[str, Layers] = {}

    def look(self) -> list[Place]:
        """What there is now. Raises ``NoDocker``."""
        try:
            found = list(self._volumes())
            seen: set[str] = set()
            found += self._containers(seen)
            found += self._images(seen)
        except (OSError, *MALFORMED) as error:
            raise NoDocker(str(error)) from error
        self._layers = {id: layers for id, layers in self._layers.items() if id in seen}
        return found

    def _volumes(self) -> list[Place]:
        return places.volumes(self._ask("/volumes"))

    def _containers(self, seen: set[str]) -> Iterator[Place]:
        for listed in self._ask("/containers/json?all=1"):
            found = self._layers_of("containers", listed["Id"], seen)
            mounted = ""
            if listed.get("State") in RUNNING:
                candidates = (found.merged, _TASKS.format(listed["Id"]))
                mounted = next((path for path in candidates if path and self._mounted(path)), "")
            if (place := places.container(listed, found, mounted)) is not None:
                yield place

    def _images(self, seen: set[str]) -> Iterator[Place]:
        for listed in self._ask("/images/json"):
            tags = [tag for tag in listed.get("RepoTags") or () if "<none>" not in tag]
            found = self._layers_of("images", listed["Id"], seen) if tags else Layers()
            for tag in sorted(tags):
                if (place := places.image(tag, found)) is not None:
                    yield place

    def _layers_of(self, kind: str, id: str, seen: set[str]) -> Layers:
        seen.add(id)
        if id not in self._layers:
            try:
                self._layers[id] = places.layers(self._ask(f"/{kind}/{quote(id, safe='')}/json"))
            except MALFORMED:  # it has just gone
                return Layers()
        return self._layers[id]

    def _ask(self, path: str) -> Any:
        """Raises ``OSError``, ``ValueError``."""
        return json.loads(dockerd.ask(self.address, path, PATIENCE, MAX_ANSWER))


async def hear(address: Path, news: Callable[[], None]) -> None:
    """Call ``news`` whenever something may have changed, from now on, until the connection ends. Raises ``OSError``,
    ``trio.BrokenResourceError``."""
    filters = quote(json.dumps({"event": list(EVENTS)}), safe="")
    async with await trio.open_unix_socket(address) as connection:
        await connection.send_all(dockerd.request(f"/events?filters={filters}"))
        async for _ in connection:
            news()
