"""The guest's files on the host: volumes, containers and images of a real Docker, over a real port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from host_agent.view import library, unmounting
from tests.e2e.harness import NO_NETWORK, Instance, eventually
from tests.e2e.software import LINKS, make_image, unpack

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(
        library.find_library() is None or not os.access("/dev/fuse", os.R_OK | os.W_OK),
        reason="this user may not use FUSE here",
    ),
]

BOUND = 120
"""Seconds for a program that touches the view, on an emulated machine."""


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=BOUND, check=False)


def sh(script: str) -> str:
    done = run("sh", "-ec", script)
    assert done.returncode == 0, done
    return done.stdout


def started(vm: Instance, image: str, name: str, *command: str, options: Sequence[str] = ()) -> None:
    vm.docker("run", "-d", "--name", name, *NO_NETWORK, *options, image, *command)


@pytest.fixture(scope="module")
def view(vm: Instance, image: str) -> Iterator[Path]:
    vm.docker("volume", "create", "view-db")
    # It has a file system of its own for what its busybox is called besides.
    script = "/bin/busybox --install -s /bin; exec sleep 100000"
    started(vm, image, "view-web", "/bin/sh", "-c", script, options=("-v", "view-db:/db", "--init"))
    shown = json.loads(vm.agentctl("view", "--json", timeout=BOUND).stdout)
    assert shown["stage"] == "mounted", shown
    yield Path(shown["path"])
    vm.agentctl("view", "--end", timeout=BOUND)
    vm.docker("rm", "-f", "-v", "view-web")
    vm.docker("volume", "rm", "-f", "view-db", check=False)
    assert unmounting.mounted() == []
    assert not Path(shown["path"]).exists()


def inside(vm: Instance, script: str) -> str:
    """What it says, without the last line's end."""
    return vm.docker("exec", "view-web", "/bin/sh", "-ec", script)


def test_what_there_is_and_which_of_it_may_be_changed(vm: Instance, image: str, view: Path) -> None:
    places = {
        place["path"]: place["read_only"]
        for place in json.loads(vm.agentctl("view", "--json").stdout)["places"]
    }
    assert places["volumes/view-db"] is False
    assert places["containers/view-web"] is False
    assert places[f"images/{image}:latest"] is True
    assert places["data"] is True
    assert "docker" in sh(f"ls {view}/data")
    assert "busybox" in sh(f"ls {view}/images/{image}:latest/bin")
    assert run("touch", f"{view}/images/{image}:latest/x").returncode != 0


def test_a_volumes_file_is_edited_here_and_read_there_and_the_reverse(vm: Instance, view: Path) -> None:
    inside(vm, "chown 999:998 /db; echo one >/db/conf")
    assert sh(f"cat {view}/volumes/view-db/conf") == "one\n"
    sh(f"echo two >>{view}/volumes/view-db/conf; echo new >{view}/volumes/view-db/new")
    assert inside(vm, "cat /db/conf; stat -c %u:%g /db/new") == "one\ntwo\n999:998"
    inside(vm, "echo three >/db/conf")
    eventually(lambda: sh(f"cat {view}/volumes/view-db/conf") == "three\n")


#: PostgreSQL without what only its extensions and Debian's scripts need (Perl, LLVM), which would be 250 MB.
LIBRARIES = (
    "busybox-static", "libgssapi-krb5-2", "libicu76", "libldap2", "liblz4-1", "libpam0g", "libpq5", "libssl3t64",
    "libsystemd0", "libxml2", "libzstd1",
)  # fmt: skip
POSTGRESQL = "/usr/lib/postgresql/17/bin"
KEPT = (
    "./usr/lib64/", "./usr/lib/x86_64-linux-gnu/lib", "./usr/lib/x86_64-linux-gnu/ld-", "./usr/lib/aarch64-linux-gnu/l",
    "./usr/lib/ld-", "./usr/bin/busybox", f".{POSTGRESQL}/postgres", f".{POSTGRESQL}/initdb",
    "./usr/lib/postgresql/17/lib/dict_snowball", "./usr/lib/postgresql/17/lib/plpgsql", "./usr/share/postgresql/17/",
)  # fmt: skip
RUN = f"""
{POSTGRESQL}/initdb -D /data --no-sync --locale=C --encoding=UTF8 --auth=trust -U postgres
exec {POSTGRESQL}/postgres -D /data -k /tmp -c listen_addresses=
"""


@pytest.fixture
def database(vm: Instance) -> Iterator[str]:
    """The volume of a PostgreSQL that runs, or is about to."""
    image = make_image(
        vm,
        "view-postgresql",
        unpack(*LIBRARIES, alone=["postgresql-17"]),
        KEPT,
        files={"etc/passwd": b"postgres:x:999:999::/:/bin/sh\n"},
        links={**LINKS, "usr/bin/sh": "busybox"},
        folders=[("data", 0o700, 999), ("tmp", 0o1777, 0)],
    )
    options = ("--init", "-u", "999:999", "-v", "view-pg:/data")
    started(vm, image, "view-pg", "/bin/sh", "-ec", RUN, options=options)
    yield "view-pg"
    vm.docker("rm", "-f", "-v", "view-pg")
    vm.docker("volume", "rm", "-f", "view-pg")
    vm.docker("rmi", image)


def test_postgresqls_data_is_looked_at_while_it_runs(vm: Instance, view: Path, database: str) -> None:
    there = view / "volumes" / database
    eventually(lambda: "ready" in run("cat", f"{there}/postmaster.pid").stdout, timeout=BOUND)
    assert {"PG_VERSION", "base", "pg_wal", "postmaster.pid"} <= set(sh(f"ls -l {there}").split())
    assert sh(f"cat {there}/PG_VERSION") == "17\n"
    assert int(sh(f"find {there} -type f | wc -l")) > 900
    assert len(sh(f"cat {there}/pg_wal/0* | wc -c")) > len("16777216")
    # Who looks has not disturbed it: it ends in good order.
    vm.docker("stop", "-t", "30", database)
    assert vm.docker("inspect", "--format", "{{.State.ExitCode}}", database) == "0"
    assert sh(f"ls {there}/postmaster.pid || echo none").endswith("none\n")


def test_copies_removals_and_git(vm: Instance, view: Path, project: Path) -> None:
    (project / "tree/deep").mkdir(parents=True)
    for number in range(20):
        (project / f"tree/deep/{number}").write_text(f"{number}\n")
    there = view / "volumes/view-db"
    sh(f"cp -r {project}/tree {there}/ && diff -r {project}/tree {there}/tree")
    assert inside(vm, "cat /db/tree/deep/7") == "7"
    sh(f"cd {there}/tree && git init -q . && git add . && git -c user.name=a -c user.email=b commit -qm all")
    assert sh(f"git -C {there}/tree status --porcelain") == ""
    inside(vm, "echo changed >/db/tree/deep/7")
    eventually(lambda: sh(f"git -C {there}/tree status --porcelain") == " M deep/7\n")
    sh(f"rm -rf {there}/tree")
    assert "tree" not in inside(vm, "ls /db")


def test_a_containers_files_while_it_runs_and_after(vm: Instance, image: str, view: Path) -> None:
    started(
        vm,
        image,
        "view-other",
        "/bin/sh",
        "-c",
        "echo made >/made; exec /bin/busybox sleep 100000",
        options=("--init",),
    )
    there = view / "containers/view-other"
    eventually(lambda: run("cat", f"{there}/made").stdout == "made\n")
    # It may have been seen before it ran: then it is read-only for a moment.
    eventually(lambda: run("sh", "-c", f"echo here >{there}/here").returncode == 0)
    assert vm.docker("exec", "view-other", "/bin/busybox", "cat", "/here") == "here"
    vm.docker("stop", "-t", "1", "view-other")
    eventually(lambda: run("touch", f"{there}/x").returncode != 0)
    assert sh(f"cat {there}/made {there}/here") == "made\nhere\n"
    vm.docker("rm", "view-other")
    eventually(lambda: not there.exists())


def test_a_volume_that_appears_and_vanishes(vm: Instance, view: Path) -> None:
    vm.docker("volume", "create", "view-later")
    eventually(lambda: (view / "volumes/view-later").is_dir())
    vm.docker("volume", "rm", "view-later")
    eventually(lambda: not (view / "volumes/view-later").exists())


def test_a_killed_server_agent_or_view_is_there_again(vm: Instance, view: Path) -> None:
    def works() -> bool:
        return run("ls", f"{view}/volumes/view-db").returncode == 0

    assert works()
    vm.guest("pkill -KILL -f '[p]ython3 -m guest_agent.view'")
    eventually(works)
    vm.guest("systemctl kill -s KILL agentctl-agent.service", check=False)
    eventually(works)
    os.kill(view_pid(vm), signal.SIGKILL)
    eventually(works)
    os.kill(vm.status()["agent_pid"], signal.SIGKILL)
    eventually(works)


def view_pid(vm: Instance) -> int:
    """Of the process that shows it."""
    argv = b"-m\0host_agent.view\0"
    return next(pid for pid in vm.processes() if argv in Path(f"/proc/{pid}/cmdline").read_bytes())
