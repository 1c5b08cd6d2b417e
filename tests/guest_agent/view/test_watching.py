from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import trio

from guest_agent.view import watching
from guest_agent.view.places import Place
from guest_agent.view.watching import Watch
from tests.guest_agent.view.dockerd import Dockerd

PATIENCE = 30.0


class Told:
    """What a watch has told, and the wait for it."""

    def __init__(self) -> None:
        self.paths: list[list[str]] = []

    async def __call__(self, places: list[Place]) -> None:
        await trio.lowlevel.checkpoint()
        self.paths.append([place.path for place in places])

    async def until(self, paths: Iterable[str]) -> None:
        wanted = list(paths)
        with trio.fail_after(PATIENCE):
            while not self.paths or self.paths[-1] != wanted:
                await trio.sleep(0.01)


async def test_what_is_around_is_told_at_first_and_when_it_changes(
    nursery: trio.Nursery, folder: Path
) -> None:
    around = [Place("/data", str(folder))]
    told = Told()
    nursery.start_soon(Watch(lambda: list(around), []).run, told)
    await told.until(["/data"])
    around.append(Place("/home/ann", str(folder)))
    await told.until(["/data", "/home/ann"])
    await trio.sleep(3 * watching.LOOK)
    assert len(told.paths) == 2


async def test_what_dockerd_tells_of_is_seen_at_once(
    nursery: trio.Nursery, dockerd: Dockerd, folder: Path
) -> None:
    told = Told()
    nursery.start_soon(Watch(lambda: [Place("/data", str(folder))], [dockerd.path]).run, told)
    await told.until(["/data"])
    with trio.fail_after(PATIENCE):
        while not dockerd.listening:
            await trio.sleep(0.01)
    dockerd.volume("db", str(folder))
    dockerd.image(1, "app:1", layers=(str(folder),))
    await trio.to_thread.run_sync(dockerd.tell)
    await told.until(["/data", "/volumes/db", "/images/app:1"])
    dockerd.answers["/volumes"] = {"Volumes": []}
    await trio.to_thread.run_sync(dockerd.tell)
    await told.until(["/data", "/images/app:1"])


async def test_what_may_not_be_entered_is_not_shown(
    nursery: trio.Nursery, dockerd: Dockerd, folder: Path
) -> None:
    dockerd.volume("db", str(folder))
    dockerd.volume("gone", str(folder / "nothing"))
    told = Told()
    nursery.start_soon(Watch(list, [dockerd.path]).run, told)
    await told.until(["/volumes/db"])


async def test_a_dockerd_that_is_started_later_is_found_and_one_that_goes_takes_its_places_along(
    nursery: trio.Nursery, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "AGAIN", 10 * PATIENCE)  # it is found before
    told = Told()
    nursery.start_soon(Watch(list, [folder / "docker.sock"]).run, told)
    await told.until([])
    with Dockerd(folder / "docker.sock") as dockerd:
        dockerd.volume("db", str(folder))
        await told.until(["/volumes/db"])
        # One answer that makes no sense takes nothing away.
        dockerd.answers["/volumes"] = b"["
        await trio.to_thread.run_sync(dockerd.tell)
        await trio.sleep(3 * watching.LOOK)
        assert told.paths[-1] == ["/volumes/db"]
    (folder / "docker.sock").unlink()
    await told.until([])
