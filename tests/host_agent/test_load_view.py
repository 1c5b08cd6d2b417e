"""The page of `agentctl top`, as it is printed."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from host_agent import load_view
from host_agent.instance_load import ContainerLoad, GuestLoad, Load, MountLoad, ProcessLoad
from protocol.api import Forward, ForwardState, MountState, Proto, Stage

GUEST = GuestLoad(
    *(2, 0.5, 0.0, 0.0, [0.5, 0.25, 0.1], 77),
    *(4 << 30, 3 << 30, 1 << 29, 60 << 30, 59 << 30, 1 << 20, 2048.0, 100.0, 0.0),
)
PORT = Forward(
    Proto.TCP, "::", 80, "localhost", 8080, ForwardState.LISTENING, process="nginx", container="web"
)
LOAD = Load(
    time=1_700_000_000.0,
    interval=2.0,
    name="default",
    stage=Stage.RUNNING,
    guest=GUEST,
    processes=[ProcessLoad("qemu", 5, 1.25, 3 << 30), ProcessLoad("host-agent", 6, 0.01, 60 << 20)],
    disk_allocated=2 << 30,
    disk_free=100 << 30,
    received=1 << 20,
    sent=0.0,
    containers=[ContainerLoad("ab12", "web", 0.33, 12 << 20, 3)],
    mounts=[MountLoad("/home/me", MountState.MOUNTED, 120.4, 4096.0, 0.0)],
    ports=[PORT],
)


def printed(load: Load, note: str = "") -> list[str]:
    console = Console(width=160, record=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(load_view.page(load, note))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_whole_page() -> None:
    lines = printed(LOAD, "q ends")
    assert lines[0].startswith("default  running  ")
    assert lines[0].endswith("  q ends")
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "IN THE VM ON THIS MACHINE",
        "cpu 50 % of 2, load 0.50 0.25 0.10 QEMU 125 % host agent 1 %",
        "memory 1 GiB of 4 GiB, cache 512 MiB QEMU 3 GiB host agent 60 MiB",
        "disk 1 GiB of 60 GiB, read 1 MiB/s, written 2 KiB/s 2 GiB allocated, 100 GiB free",
        "network in 100 B/s, out 0 B/s 1 MiB/s from the VM, 0 B/s to it",
        "",
        "CONTAINER CPU MEMORY PROCESSES",
        "web 33 % 12 MiB 3",
        "",
        "MOUNT STATE CALLS READ WRITTEN",
        "/home/me mounted 120/s 4 KiB/s 0 B/s",
        "",
        "PORT PROTO STATE FROM",
        "localhost:8080 tcp listening web",
    ]


def test_what_is_not_there_has_no_table() -> None:
    lines = printed(replace(LOAD, guest=None, containers=[], mounts=[], ports=[], stage=Stage.DOCKER))
    assert any("the guest agent does not answer" in line for line in lines)
    assert not any("CONTAINER" in line or "MOUNT" in line or "PORT" in line for line in lines)


def test_a_processor_that_waits_or_is_stolen_is_said() -> None:
    lines = printed(replace(LOAD, guest=replace(GUEST, cpu_waiting=0.4, cpu_stolen=0.1)))
    assert "waits for the disk 40 %, stolen 10 %" in lines[2]


def test_words_of_the_guest_are_only_words() -> None:
    evil = "[bold]x\x1b[2J\nnext"
    load = replace(
        LOAD,
        containers=[replace(LOAD.containers[0], name=evil)],
        ports=[replace(PORT, container=evil)],
        mounts=[replace(LOAD.mounts[0], path=evil)],
    )
    page = "\n".join(printed(load))
    assert page.count(r"[bold]x\x1b[2J next") == 3


def test_of_too_many_rows_it_is_said_how_many() -> None:
    lines = printed(replace(LOAD, containers=LOAD.containers * (load_view.MAX_ROWS + 3)))
    assert sum(line.startswith("web") for line in lines) == load_view.MAX_ROWS
    assert "and 3 more" in lines
