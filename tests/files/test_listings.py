"""What a program sees of a directory, while the host, others and the agent's end get in between.

Each script knows the same directory twice: as the guest has it and as the host has it. Of an edit there nobody is
to tell by the directory's time stamp, which is put back: the kernel would compare it, and so hide what goes wrong.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator

import pytest

from guest_agent.fuse.listing import WHOLE
from tests.files.harness import Plane, eventually

PRELUDE = """
import os, sys, time
guest, host = sys.argv[1:]

def edit(change):
    before = os.stat(host)
    change()
    os.utime(host, ns=(before.st_atime_ns, before.st_mtime_ns))

def make(name):
    edit(lambda: os.close(os.open(f"{host}/{name}", os.O_CREAT | os.O_WRONLY)))

def settle(directory=guest):
    "Both agree, within the time that news may take."
    end = time.monotonic() + 2
    while sorted(os.listdir(directory)) != sorted(os.listdir(directory.replace(guest, host, 1))):
        assert time.monotonic() < end, set(os.listdir(directory)) ^ set(os.listdir(host))

def rest(stream):
    return [entry.name for entry in stream]

def some(stream, count):
    return [next(stream).name for _ in range(count)]
"""


@pytest.fixture(autouse=True)
def directory(plane: Plane) -> Iterator[None]:
    (plane.host / "d").mkdir()
    yield
    shutil.rmtree(plane.host / "d")


def play(plane: Plane, script: str) -> str:
    return plane.python(PRELUDE + script, str(plane.guest / "d"), str(plane.host / "d"), timeout=60)


@pytest.mark.parametrize("already", [0, 10, 1000])
def test_no_edit_goes_unseen(plane: Plane, already: int) -> None:
    play(
        plane,
        f"for i in range({already}): make(f'already-{{i}}')\n"
        """
for i in range(60):
    settle()
    make(f"new-{i}")
    settle()
    edit(lambda: os.rename(f"{host}/new-{i}", f"{host}/renamed-{i}"))
    settle()
    if i % 2:
        edit(lambda: os.unlink(f"{host}/renamed-{i}"))
""",
    )


def test_streams_that_take_turns_see_each_name_once(plane: Plane) -> None:
    play(
        plane,
        """
for i in range(3000): make(f"stays-{i}")
for i in range(300): make(f"goes-{i}")
settle()
stays = {f"stays-{i}" for i in range(3000)}
streams = [os.scandir(guest) for _ in range(4)]
seen = [some(stream, 10 * i) for i, stream in enumerate(streams)]
for turn in range(30):
    for mine, stream in zip(seen, streams):
        mine += some(stream, 90)
    make(f"came-{turn}")
    edit(lambda: os.unlink(f"{host}/goes-{turn}"))
    if turn % 10 == 9:
        settle()
for mine, stream in zip(seen, streams):
    mine += rest(stream)
    assert len(mine) == len(set(mine))
    assert stays <= set(mine)
settle()
""",
    )


def test_one_that_was_left_in_the_middle_does_not_spoil_those_that_follow(plane: Plane) -> None:
    play(
        plane,
        """
for i in range(1000): make(f"name-{i}")
settle()
kept = []
for i in range(30):
    kept.append(os.scandir(guest))
    some(kept[-1], 1 + 31 * i)
    make(f"new-{i}")
    settle()
    rest(kept[i // 2])
    settle()
    assert f"new-{i}" in os.listdir(guest)
""",
    )


def test_the_guests_own_changes_are_in_the_next_listing(plane: Plane) -> None:
    play(
        plane,
        """
for i in range(200): make(f"name-{i}")
settle()
left = os.scandir(guest)
some(left, 3)
for i in range(100):
    os.mkdir(f"{guest}/own-{i}")
    assert f"own-{i}" in os.listdir(guest)
    os.rename(f"{guest}/own-{i}", f"{guest}/mine-{i}")
    assert f"mine-{i}" in os.listdir(guest) and f"own-{i}" not in os.listdir(guest)
    if i % 3:
        os.rmdir(f"{guest}/mine-{i}")
        assert f"mine-{i}" not in os.listdir(guest)
    if i % 25 == 7:
        make(f"new-{i}")
        settle()
assert len(rest(left)) >= 197
settle()
""",
    )


def test_many_directories_and_again(plane: Plane) -> None:
    play(
        plane,
        """
for i in range(400):
    os.makedirs(f"{host}/{i % 40}/{i}")
    open(f"{host}/{i % 40}/{i}/file-{i}", "w").close()
settle()
for again in range(2):
    found = {name for _, _, files in os.walk(guest) for name in files}
    assert found == {f"file-{i}" for i in range(400)}, len(found)
open(f"{host}/0/0/another", "w").close()
settle(f"{guest}/0/0")
""",
    )


def test_a_stream_outlives_the_agent_and_the_server(plane: Plane) -> None:
    running = plane.start(
        [
            sys.executable,
            "-c",
            PRELUDE
            + """
for i in range(2000): make(f"name-{i}")
settle()
streams = [os.scandir(guest) for _ in range(2)]
seen = [some(stream, 100) for stream in streams]
make("begun")
while not os.path.exists(f"{host}/../go-1"): time.sleep(0.01)
seen[0] += some(streams[0], 1000)
make("halfway")
while not os.path.exists(f"{host}/../go-2"): time.sleep(0.01)
for mine, stream in zip(seen, streams):
    mine += rest(stream)
    assert len(mine) == len(set(mine))
    assert {f"name-{i}" for i in range(2000)} <= set(mine)
settle()
make("last")
settle()
""",
            str(plane.guest / "d"),
            str(plane.host / "d"),
        ]
    )
    with running:
        eventually("the streams have begun", (plane.host / "d/begun").exists, 30)
        plane.restart_agent()
        (plane.host / "go-1").touch()
        eventually("one has gone on", (plane.host / "d/halfway").exists, 30)
        plane.restart_server()
        (plane.host / "go-2").touch()
        finished = running.wait(60)
    for name in ("go-1", "go-2"):
        (plane.host / name).unlink()
    assert finished.status == 0, finished.errors


@pytest.mark.parametrize("look", ["ls -lR", "du -a", "stat"])
def test_who_looks_at_all_files_after_find_need_not_ask_for_each(plane: Plane, look: str) -> None:
    for number in range(600):
        folder = plane.host / "d" / f"{number % 20}"
        folder.mkdir(exist_ok=True)
        (folder / f"file-{number}").write_text("content")
    plane.heard()
    plane.sh("test -d d")
    time.sleep(WHOLE + 0.1)  # so that nobody is known to look at files
    plane.sh("find d >/dev/null")
    asked = requests(plane)
    if look == "stat":
        said = plane.python(
            "import os; print(sum(e.stat().st_size for d, _, _ in os.walk('d') for e in os.scandir(d) if e.is_file()))"
        )
        assert int(said) == 4200
    else:
        assert plane.sh(f"{look} d").count("file-") == 600
    assert requests(plane) - asked < 350


def requests(plane: Plane) -> int:
    use = plane.agent.use()
    assert use is not None
    return use.requests
