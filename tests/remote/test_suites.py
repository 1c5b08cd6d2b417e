"""What holds for a VM's ports and mounts holds over SSH: the same tests, against a machine that is attached."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Instance
from tests.e2e.test_port_rules import (
    test_a_port_is_there_and_gone_again_each_time,
    test_a_rule_keeps_a_port_inside,
    test_a_rule_moves_a_port,
    test_a_rule_that_cannot_be_is_refused_and_changes_nothing,
    test_datagrams_come_and_go_and_so_does_their_port,
    test_watching_tells_of_a_port_once_it_can_be_reached,
)
from tests.e2e.test_ports import (
    test_a_listener_on_any_address_is_on_localhost_v4_and_v6,
    test_a_port_that_was_stolen_between_close_and_listen_is_taken_when_it_is_free,
    test_a_server_that_is_killed_resets_its_clients,
    test_half_close_reaches_the_guest_and_what_it_says_last_comes_back,
    test_many_ports_at_once,
    test_the_port_stays_until_the_last_listener_that_maps_to_it_goes,
)
from tests.files.accepted import ACCEPTED, BY_AN_ORDINARY_USER
from tests.remote.machine import PYTHON
from tests.remote.site import Site, site

__all__ = [
    "test_a_listener_on_any_address_is_on_localhost_v4_and_v6",
    "test_a_port_is_there_and_gone_again_each_time",
    "test_a_port_that_was_stolen_between_close_and_listen_is_taken_when_it_is_free",
    "test_a_rule_keeps_a_port_inside",
    "test_a_rule_moves_a_port",
    "test_a_rule_that_cannot_be_is_refused_and_changes_nothing",
    "test_a_server_that_is_killed_resets_its_clients",
    "test_datagrams_come_and_go_and_so_does_their_port",
    "test_half_close_reaches_the_guest_and_what_it_says_last_comes_back",
    "test_many_ports_at_once",
    "test_the_port_stays_until_the_last_listener_that_maps_to_it_goes",
    "test_watching_tells_of_a_port_once_it_can_be_reached",
]

SCRIPTS = Path(__file__).resolve().parents[1] / "files"


@pytest.fixture(scope="module")
def attached() -> Iterator[Site]:
    with site("root") as made:
        shutil.copytree(SCRIPTS, made.share / "scripts")
        made.user.attach(*made.mount_option)
        yield made
        made.user.detach()


@pytest.fixture
def vm(attached: Site) -> Instance:
    """As these tests call it."""
    return attached.user


def test_posix_on_the_mount_is_what_it_is_below_it(attached: Site, long: bool) -> None:
    options = ["--names", "300", "--every", "1" if long else "8"]

    def outcomes(scripts: str, place: str) -> dict[str, Any]:
        run = ["sh", "-c", f'cd {scripts} && exec {PYTHON} -B posix_table.py "$@"', "sh", place, *options]
        return dict(json.loads(attached.machine.run(run, timeout=600).output))

    (attached.share / "table").mkdir()
    (attached.share / "table").chmod(0o755)
    mounted = outcomes("share/scripts", f"{attached.there}/table")
    below = dict(json.loads(_here([PYTHON, "-B", "posix_table.py", str(attached.share / "table"), *options])))
    assert mounted.keys() == below.keys()
    wrong = {
        row: (below[row], outcome)
        for row, outcome in mounted.items()
        if outcome != below[row]
        and outcome != ACCEPTED.get(row, (below[row],))[0]
        # Whoever has ids of their own there has none here.
        and not row.startswith(BY_AN_ORDINARY_USER)
    }
    assert not wrong, json.dumps(wrong, indent=1)


def _here(argv: list[str]) -> str:
    return subprocess.run(argv, cwd=SCRIPTS, capture_output=True, check=True, timeout=600).stdout.decode()


def test_random_operations_on_the_mount(attached: Site, long: bool) -> None:
    (attached.share / "fsx").mkdir()
    script = f"cd share/scripts && {PYTHON} -B fsx.py {attached.there}/fsx --operations {20_000 if long else 1_000}"
    assert "ok: " in attached.sh(script, timeout=600)
