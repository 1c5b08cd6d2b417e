"""The view of somebody who is not root: mounted and unmounted by fusermount3, and nobody else's."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from guest_agent.view.places import Place
from tests.files.harness import eventually
from tests.files.ordinary import GUEST, obstacle
from tests.view.harness import View

pytestmark = pytest.mark.skipif(bool(reason := obstacle()), reason=reason or "nothing is in the way")

FILE = "volumes/db/file"


def test_what_an_ordinary_user_does_with_a_view_and_what_ends_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("there\n")
    with View(Place("/volumes/db", str(tmp_path), read_only=False, inherit=True), ordinary=True) as view:
        options = next(options for _, options in view.namespace.mounts())
        assert {"nosuid", "nodev", f"user_id={GUEST}"} <= set(options.split(","))
        assert "allow_other" not in options
        # What is root's there is this user's here, and what is made here is root's there.
        assert view.sh(f"stat -c %u {FILE}; cat {FILE}; echo here >{FILE}; mkdir volumes/db/new") == (
            f"{GUEST}\nthere\n"
        )
        assert (tmp_path / "file").read_text() == "here\n"
        assert (tmp_path / "new").stat().st_uid == 0

        with view.start(["sh", "-c", "cd volumes/db; echo ready; exec sleep 1000"]) as inside:
            eventually("it is inside", lambda: "ready" in inside.said()[0])
            view.kill_view()
            eventually("the guard unmounts it", lambda: not view.is_mounted(), 60)
        assert list(view.path.iterdir()) == []
        view.start_view()
        view.wait_mounted()
        assert view.sh(f"cat {FILE}") == "here\n"
        view.signal_guest(signal.SIGSTOP)  # no end waits for the guest
        assert view.end_view() == 0
        assert not view.is_mounted()
        view.signal_guest(signal.SIGCONT)
