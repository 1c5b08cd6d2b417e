"""Whatever dies, hangs or lies: no program here waits for ever, and the folder is left as it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agent.view.places import Place
from tests.files.harness import eventually
from tests.files.service import SOURCES
from tests.view.harness import View

BOUND = 60
"""Seconds: three times what an operation may wait, on a machine with other work."""

DOWN, SILENT = "Host is down", "Connection timed out"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("guest")
    (top / "db").mkdir()
    (top / "db/file").write_text("content\n")
    return top


@pytest.fixture
def view(guest: Path) -> Iterator[View]:
    with View(Place("/volumes/db", str(guest / "db"), read_only=False), hasty=True) as view:
        yield view


def failed(view: View, script: str) -> str:
    """What a script says that must fail, and must end."""
    finished = view.run(["sh", "-c", script], status=None, timeout=BOUND)
    assert finished.status != 0, finished
    return finished.errors


def works(view: View) -> bool:
    finished = view.run(["cat", "volumes/db/file"], status=None, timeout=BOUND)
    return finished.output == "content\n"


@pytest.fixture
def patient(guest: Path) -> Iterator[View]:
    """As it is built: on a busy machine Python takes longer to begin than the hasty wait."""
    with View(Place("/volumes/db", str(guest / "db"), read_only=False)) as view:
        yield view


def test_a_killed_server_is_waited_for_and_open_files_go_on(patient: View) -> None:
    view = patient
    with view.start(
        [
            "sh",
            "-ec",
            "exec 3<>volumes/db/file; echo ready; read line </proc/self/fd/3; while ! test -e volumes/db/go; do sleep 0.1; done; cat <&3",
        ]
    ) as program:
        eventually("it has it open", lambda: "ready" in program.said()[0])
        view.kill_guest()
        view.start_guest()
        eventually("it is there again", lambda: works(view), 60)
        view.sh("touch volumes/db/go")
        finished = program.wait(BOUND)
        assert (finished.status, finished.output) == (0, "ready\ncontent\n"), finished
    view.sh("rm volumes/db/go")


def test_a_server_that_does_not_come_back_is_down_and_one_that_does_is_there(view: View) -> None:
    view.kill_guest()
    # A port has no connections, so nobody is told: the first word that is not answered shows it.
    for script in ("cat volumes/db/file", "ls volumes/db", "echo x >volumes/db/new"):
        said = failed(view, script)
        assert DOWN in said or SILENT in said
    assert view.is_mounted()
    view.start_guest()
    eventually("it is there again", lambda: works(view), 60)
    assert view.sh("ls volumes/db") == "file\n"


def test_a_server_that_hangs_is_waited_for_once(view: View) -> None:
    assert works(view)
    view.signal_guest(signal.SIGSTOP)
    try:
        said = failed(view, "sleep 1.5; cat volumes/db/file")
        assert SILENT in said or DOWN in said
        # Many more cost no more than one.
        said = failed(view, "for i in 1 2 3 4 5 6 7 8; do cat volumes/db/file; done")
        assert said.count(SILENT) + said.count(DOWN) == 8
    finally:
        view.signal_guest(signal.SIGCONT)
    eventually("it goes on", lambda: works(view), 60)


def test_a_lost_link(view: View) -> None:
    assert works(view)
    with view.port.cut():
        assert DOWN in failed(view, "sleep 1.5; cat volumes/db/file")
    eventually("it is there again", lambda: works(view), 60)


def test_a_change_that_waits_for_the_next_server_is_made_in_its_own_volume_or_not_at_all(guest: Path) -> None:
    places = [Place(f"/volumes/{name}", str(guest / name), read_only=False) for name in ("one", "other")]
    for place in places:
        Path(place.source).mkdir()
    with View(*places) as view:
        view.sh("ls volumes/one volumes/other")
        with view.port.cut():
            view.kill_guest()
            view.tell(*reversed(places))
            view.start_guest()
            # The link is known to be down, so this waits for the next.
            waiting = view.start(["mkdir", "volumes/one/new"])
            time.sleep(1)
        with waiting:
            finished = waiting.wait(BOUND)
        assert finished.status == 0 or DOWN in finished.errors, finished
        assert [path.name for path in guest.glob("o*/*")] == ["new"] * (finished.status == 0)
        assert not (guest / "other/new").exists()
        eventually("it goes on", lambda: view.run(["ls", "volumes/one"], status=None).status == 0, 60)


def test_a_killed_view_leaves_an_empty_folder(view: View) -> None:
    with view.start(["sh", "-c", "cd volumes/db; echo ready; sleep 2; ls; cat file"]) as inside:
        eventually("it is inside", lambda: "ready" in inside.said()[0])
        view.kill_view()
        eventually("it is unmounted", lambda: not view.is_mounted(), 60)
        assert inside.wait(BOUND).status != 0
    view.sh('test -z "$(ls -A)"; touch x; rm x', cwd=view.path)
    view.start_view()
    view.wait_mounted()
    assert works(view)


def test_a_view_in_a_shared_folder_is_not_shared(view: View) -> None:
    """Else a container that walks through the host's folder would come to its own files, by way of the host."""
    script = """
import sys
from pathlib import Path
from fileserver.foreign import ForeignDevices
from fileserver.manner import Manner
from fileserver.tree import Tree
from host_agent.view.unmounting import KIND
from protocol.files import ROOT, List, Lookup
from tests.fileserver.served import Journal
views = ForeignDevices(lambda kind: kind == KIND.encode())
tree = Tree(sys.argv[1], read_only=False, recorder=Journal(), manner=Manner(is_foreign=views.__contains__))
seen = tree.perform(Lookup(1, 0, ROOT, b"view")).value
listing = tree.perform(List(1, 0, seen.node, 1, 0, True))
print(len(listing.payload), len(list(Path(sys.argv[1], "view").iterdir())))
tree.close()
"""
    said = view.python(script, str(view.path.parent), env={**os.environ, "PYTHONPATH": str(SOURCES)})
    assert said == "0 1\n"


def test_a_time_that_no_message_can_say_ends_nothing(view: View) -> None:
    view.python("import os; os.utime('volumes/db/file', ns=(2**40 * 10**9,) * 2)")
    assert works(view)


def test_a_view_that_hangs_is_ended_by_who_started_it(view: View) -> None:
    """The guard does the rest."""
    os.kill(view.view_pid, signal.SIGSTOP)
    with view.start(["cat", "volumes/db/file"]) as waiting:
        view.kill_view()
        assert waiting.wait(BOUND).status != 0
    eventually("it is unmounted", lambda: not view.is_mounted(), 60)


def test_the_end_of_the_host_agent_is_its_end(view: View) -> None:
    with view.start(["sh", "-c", "cd volumes/db; echo ready; exec sleep 1000"]) as inside:
        eventually("it is inside", lambda: "ready" in inside.said()[0])
        assert view.end_view() == 0
        assert not view.is_mounted()
    assert list(view.path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_good_order(view: View, number: signal.Signals) -> None:
    os.kill(view.view_pid, number)
    eventually("it is unmounted", lambda: not view.is_mounted(), 60)


def test_who_unmounts_it_ends_it(view: View) -> None:
    view.namespace.run(["fusermount3", "-u", str(view.path)], cwd=Path("/"))
    assert view.wait_view() == 0
    assert not view.is_mounted()


def test_no_guest_that_says_nothing_is_waited_for_by_the_kernel(guest: Path) -> None:
    """Nothing is mounted before the guest has said what there is."""
    with View(Place("/volumes/db", str(guest / "db"))) as view:
        view.end_view()
        view.kill_guest()
        view.start_view()
        assert not view.state().mounted
        assert not view.is_mounted()


def test_no_symlink_leads_out_of_the_view(view: View, guest: Path) -> None:
    """They are followed by this kernel, which has a file of ours where each of them would lead."""
    secret = guest / "secret"
    secret.write_text("not the guest's\n")
    folder = guest / "db/l"
    folder.mkdir()
    up = "../" * 40
    links = {
        "absolute": str(secret),
        "relative": f"{up}{str(secret)[1:]}",
        "hop": "../l/../../..",
        "chain": f"hop/../../../../../../..{secret}",
        "own": "/proc/self/root" + str(secret),
        "deep": "a/b/c",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "a").symlink_to("hop")
    for name in links:
        finished = view.run(["cat", f"volumes/db/l/{name}"], status=None)
        assert "not the guest's" not in finished.output, name
        assert finished.status != 0
        finished = view.run(["cat", f"volumes/db/l/{name}{secret}"], status=None)
        assert "not the guest's" not in finished.output, name
    shown = view.sh("find volumes/db/l -type l -exec readlink {} ';'").splitlines()
    assert shown
    assert not [target for target in shown if target.startswith("/")]
    for name in (*links, "a"):
        (folder / name).unlink()
    folder.rmdir()


def test_special_files_do_nothing_here(view: View, guest: Path) -> None:
    os.mkfifo(guest / "db/fifo")
    os.mknod(guest / "db/null", 0o666 | 0o020000, os.makedev(1, 3))
    assert "Permission denied" in failed(view, "echo x >volumes/db/null")
    assert view.sh("stat -c %F volumes/db/fifo volumes/db/null").splitlines() == [
        "fifo",
        "character special file",
    ]
    assert "Operation not permitted" in failed(view, "mknod volumes/db/other c 1 3")
    view.sh("rm volumes/db/fifo volumes/db/null")
