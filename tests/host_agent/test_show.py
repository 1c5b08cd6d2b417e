from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace

import pytest

from host_agent import show
from host_agent.doctor.finding import Diagnosis, Finding, advice, ok, problem
from host_agent.errors import UserError
from host_agent.progress import progress
from protocol.api import (
    ControlLink,
    Event,
    Forward,
    ForwardState,
    GuestInfo,
    InstanceStatus,
    Mount,
    Mounts,
    MountSpec,
    MountState,
    PortRule,
    PortSettings,
    Proto,
    SocketForward,
    SocketRow,
    SocketRows,
    Stage,
    Transport,
)

GIB = 1 << 30

# What a hostile or broken guest may call a unit: colours, a title, cursor movement, rich's own markup, a
# bidirectional override, half a surrogate pair.
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J [bold]x[/bold] [/] \\[link=http://a]y \u202e \udcff \r\n end"

RUNNING = InstanceStatus(
    name="default",
    stage=Stage.RUNNING,
    detail="ready",
    hint="",
    accelerator="tcg",
    cpus=2,
    memory=2 * GIB,
    disk=60 * GIB,
    image="abc",
    qemu_pid=100,
    agent_pid=101,
    started_at=0.0,
    restarts=0,
    guest_connected=True,
    guest_digest="d",
    host_digest="d",
    docker_socket="/home/me/.agentctl/instances/default/docker.sock",
    docker_context="agentctl",
    guest=GuestInfo("6.12", 5.0, 2 * GIB, GIB, 2, 60 * GIB, 59 * GIB, "trace"),
)
ROW = Forward(Proto.TCP, "0.0.0.0", 80, "127.0.0.1", 8080, ForwardState.LISTENING, "", "docker.service")


def assert_harmless(text: str) -> None:
    """Nothing but text, whatever a terminal makes of it."""
    assert all(character.isprintable() or character == "\n" for character in text), repr(text)


def test_what_runs_the_containers_is_where_it_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    show.status(RUNNING)
    assert "unix:///" in (docker := capsys.readouterr().out)
    assert "context" in docker
    show.status(replace(RUNNING, docker_socket="", docker_context="", containerd_socket="/c.sock"))
    containerd = capsys.readouterr().out
    assert "containerd" in containerd
    assert "unix:///c.sock" in containerd
    assert "context" not in containerd


def test_what_carries_the_control_link_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(control: ControlLink | None) -> str:
        show.status(replace(RUNNING, control=control))
        return capsys.readouterr().out

    assert "control link" not in shown(None)
    assert "control link" not in shown(ControlLink(Transport.NONE))  # while it boots
    usual = shown(ControlLink(Transport.VIRTIO_SERIAL, 1.0))
    assert re.search(r"control link +over virtio-serial, for", usual)
    over_ssh = shown(ControlLink(Transport.SSH, 1.0, "silence"))
    assert "the control link goes over SSH: silence" in over_ssh
    assert re.search(r"control link +over SSH, for", over_ssh)
    lost = shown(ControlLink(Transport.NONE, 1.0, "silence", "sshd is not there", "look", 3))
    assert "the control link is lost: silence; nor over SSH: sshd is not there" in lost
    assert "hint: look" in lost
    assert re.search(r"control link +lost, for .*, 3 attempts", lost)


def test_words_are_what_they_look_like() -> None:
    plain = show.words(HOSTILE).plain
    assert_harmless(plain)
    assert "\n" not in plain
    assert r"\x1b[31mred\x1b]0;title\x07 \x9b2J [bold]x[/bold] [/] \[link=http://a]y" in plain
    assert show.words("grüße, 世界").plain == "grüße, 世界"


@pytest.mark.parametrize("colours", [False, True])
def test_words_of_the_guest_are_printed_harmlessly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, colours: bool
) -> None:
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    show.forwards([replace(ROW, unit=HOSTILE, reason=HOSTILE)], everything=True)
    show.status(replace(RUNNING, stage=Stage.FAILED, detail=HOSTILE, hint=HOSTILE, docker_socket=HOSTILE))
    show.error(UserError(HOSTILE, HOSTILE))
    show.warning(HOSTILE)
    show.note(HOSTILE)
    show.mounts(Mounts([Mount(MountSpec(HOSTILE, HOSTILE), MountState.FAILED, HOSTILE, HOSTILE, lost=1)]))
    show.diagnosis(Diagnosis.of([problem("folders", HOSTILE, HOSTILE)]))
    with progress() as report:
        report(HOSTILE)
    captured = capsys.readouterr()
    for output in (captured.out, captured.err):
        assert_harmless(output)
        assert output.count("[bold]x[/bold] [/] \\[link=http://a]y") >= 3


def test_on_a_terminal_only_our_own_sequences_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    show.forwards([replace(ROW, unit="\x1b]0;title\x07", reason="\x1b[2J")], everything=True)
    show.error(UserError("\x1b[2J"))
    with progress() as report:
        report("\x1b[2J")
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\x1b]0" not in terminal.getvalue()
    assert "\x1b[32m" in terminal.getvalue(), "our own colours are wanted"


@pytest.mark.parametrize(
    ("findings", "lines"),
    [
        ([ok("qemu", "7.2")], ["qemu  ok       7.2", "everything is well"]),
        (
            [ok("qemu", "7.2"), advice("watching", "few", "do it")],
            [
                "qemu      ok       7.2",
                "watching  advice   few",
                "                   fix: do it",
                "everything works; 1 thing could be better",
            ],
        ),
        (
            [problem("qemu", "no", "get it"), problem("disk", "full")],
            [
                "qemu  problem  no",
                "               fix: get it",
                "disk  problem  full",
                "2 things do not work",
            ],
        ),
    ],
)
def test_a_diagnosis(findings: list[Finding], lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show.diagnosis(Diagnosis.of(findings))
    assert capsys.readouterr().out.splitlines() == lines


def test_a_running_instance(capsys: pytest.CaptureFixture[str]) -> None:
    show.status(RUNNING)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "default  running"
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "disk 60 GiB, 1 GiB used" in text
    assert "guest agent connected\n" in text
    assert "docker unix:///home/me/.agentctl/instances/default/docker.sock" in text
    assert "retried" not in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"guest_connected": False}, "guest agent not connected"),
        ({"guest_digest": "old"}, "guest agent connected, of another version; restart to update it"),
        ({"restarts": 1}, "boots retried 1"),
        ({"agent_restarts": 2}, "host agent restarts 2"),
        ({"stage": Stage.BOOTING, "detail": "booting the VM"}, "default booting booting the VM"),
        ({"guest": None}, "disk 60 GiB\n"),
        ({}, "mounts none"),
        ({"mounts": 2, "mounts_working": 2}, "mounts 2\n"),
        ({"mounts": 2, "mounts_working": 1}, "mounts 1 of 2 work; see: agentctl mounts"),
        ({}, "bulk data inline\n"),
        ({"bulk_memory": 64 << 20}, "bulk data shared memory, 64 MiB\n"),
        ({"bulk_reason": "asked for with --no-bulk"}, "bulk data inline (asked for with --no-bulk)\n"),
    ],
)
def test_what_is_unusual_is_said(
    capsys: pytest.CaptureFixture[str], changes: dict[str, object], line: str
) -> None:
    show.status(replace(RUNNING, **changes))  # type: ignore[arg-type]
    text = "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert line in text + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59.9, "59 s"), (61, "1 min 1 s"), (3661, "1 h 1 min"), (90000, "25 h 0 min")],
)
def test_how_long_it_is_up(seconds: float, text: str) -> None:
    assert show._duration(seconds) == text


def test_what_is_wrong_with_a_running_instance_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show.status(replace(RUNNING, detail="the host's disk is full, and the VM waits", hint="make room"))
    text = capsys.readouterr().out
    assert "running  the host's disk is full, and the VM waits\n  hint: make room" in text


def test_forwarded_sockets(capsys: pytest.CaptureFixture[str]) -> None:
    show.rules(PortSettings(), SocketRows([]))
    assert "agentctl forward add" in capsys.readouterr().out
    table = SocketRows(
        [
            SocketRow(SocketForward("/run/g", "/tmp/h"), ForwardState.LISTENING),
            SocketRow(SocketForward("/run/db", "localhost:5432", True), ForwardState.CONFLICT, HOSTILE),
        ]
    )
    show.sockets(table)
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["/tmp/h", "->", "/run/g", "listening"]
    assert second.split()[:4] == ["localhost:5432", "<-", "/run/db", "conflict"]
    assert "\x1b" not in second
    show.rules_json(PortSettings(), table)
    assert json.loads(capsys.readouterr().out)["sockets"][0] == {
        "guest": "/run/g",
        "host": "/tmp/h",
        "reverse": False,
        "state": "listening",
        "reason": "",
    }


def test_rules_of_ports(capsys: pytest.CaptureFixture[str]) -> None:
    rules = [
        PortRule(Proto.TCP, "0.0.0.0", False, 80, 1, "0.0.0.0", 8080),
        PortRule(None, "0.0.0.0", True, 1, 100, host_port=1, ignore=True),
        PortRule(None, "127.0.0.1", False, 5432, 1, host_socket="/run/db.sock", static=True),
    ]
    settings = PortSettings(rules, lan=True, privileged_offset=10000)
    show.rules(settings, SocketRows([]))
    lan, offset, _, *shown = capsys.readouterr().out.splitlines()
    assert lan == "what listens on all addresses of the VM is open to other machines"
    assert offset == "ports below 1024 have 10000 added"
    assert [line.split() for line in shown] == [
        ["0.0.0.0:8080:80/tcp", "any", "address"],
        ["1-100", "all", "addresses", "ignore"],
        ["/run/db.sock:5432", "127.0.0.1", "static"],
    ]
    show.rules_json(settings, SocketRows([]))
    values = json.loads(capsys.readouterr().out)
    assert (values["lan"], values["privileged_offset"], values["sockets"]) == (True, 10000, [])
    assert values["rules"][1] == {
        "proto": "any",
        "guest_ip": "0.0.0.0",
        "guest_ip_must_be_zero": True,
        "guest_port": "1-100",
        "ignore": True,
    }


def test_a_change_of_a_port_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    event = Event(1.5, "port-conflict", f"taken by {HOSTILE}", {"port": "80", "proto": "tcp"})
    show.change(event)
    text = capsys.readouterr().out
    assert_harmless(text)
    assert len(text.splitlines()) == 1
    show.change_json(event)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "time": 1.5,
        "kind": "port-conflict",
        "message": f"taken by {HOSTILE}",
        "port": 80,
        "state": "conflict",
        "proto": "tcp",
    }


def test_a_socket_of_the_host_is_shown_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    show.forwards([replace(ROW, host_address="/run/web.sock", host_port=0)], everything=False)
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "/run/web.sock"


def test_ports_that_are_ignored_are_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROW, replace(ROW, guest_port=22, host_address="", host_port=0, state=ForwardState.IGNORED)]
    show.forwards(rows, everything=False)
    assert "0.0.0.0:22" not in capsys.readouterr().out
    show.forwards(rows, everything=True)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == ["HOST", "GUEST", "PROTO", "STATE", "FROM", "REASON"]
    assert shown[1] == ["127.0.0.1:8080", "0.0.0.0:80", "tcp", "listening", "docker.service"]
    assert shown[2] == ["-", "0.0.0.0:22", "tcp", "ignored", "docker.service"]


def test_ipv6_addresses_are_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    show.forwards([replace(ROW, guest_address="::1")], everything=False)
    assert " [::1]:80 " in capsys.readouterr().out


def test_a_line_is_never_folded_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "because " * 60 + "of that"
    show.forwards([replace(ROW, reason=reason)], everything=False)
    assert reason in capsys.readouterr().out.splitlines()[1]


def test_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    show.forwards([replace(ROW, state=ForwardState.IGNORED)], everything=False)
    assert capsys.readouterr().out.startswith("nothing in the VM listens")


def test_json_has_the_fields_of_the_messages(capsys: pytest.CaptureFixture[str]) -> None:
    show.status_json(RUNNING)
    told = json.loads(capsys.readouterr().out)
    assert list(told) == list(InstanceStatus.__slots__)
    assert (told["stage"], told["memory"], told["guest"]["data_free"]) == ("running", 2 * GIB, 59 * GIB)
    show.forwards_json([replace(ROW, unit=HOSTILE)])
    output = capsys.readouterr().out
    assert_harmless(output)
    assert json.loads(output)[0]["unit"] == HOSTILE
    assert json.loads(output)[0]["state"] == "listening"


HOME = Mount(MountSpec("/home/me", "/home/me"), MountState.MOUNTED)
DATA = Mount(
    MountSpec("/srv/data", "/data", read_only=True, host_locks=True, real_path="/disk/data"),
    MountState.MISSING,
    "/srv/data is missing on the host",
    "make it",
)


def test_mounts_are_a_table_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show.mounts(Mounts([HOME, DATA, DATA]))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split("  ")[0] == "FOLDER"
    assert lines[1].split() == ["/home/me", "same", "path", "rw", "mounted"]
    assert " ".join(lines[2].split()) == (
        "/srv/data /data ro, locks=host missing /srv/data is missing on the host"
    )
    assert lines[4:] == ["hint: make it"]


def test_a_mount_that_is_being_compared_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show.mounts(Mounts([replace(HOME, revalidating=True), replace(DATA, revalidating=True)]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[4] == "revalidating"
    assert " missing " in lines[2], "which is worse"


def test_files_that_were_lost_are_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    show.mounts(Mounts([replace(HOME, lost=3)]))
    assert "note: in /home/me, 3 open files or locks were lost (ESTALE)" in capsys.readouterr().out


def test_without_mounts_it_is_said_how_to_have_some(capsys: pytest.CaptureFixture[str]) -> None:
    show.mounts(Mounts([]))
    assert "agentctl up --mount ." in capsys.readouterr().out


def test_json_of_a_mount_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    show.mounts_json(Mounts([replace(DATA, calls=7, clock_skew_ms=-5)]))
    assert json.loads(capsys.readouterr().out) == [
        {
            "host_path": "/srv/data",
            "guest_path": "/data",
            "read_only": True,
            "host_locks": True,
            "real_path": "/disk/data",
            "state": "missing",
            "reason": "/srv/data is missing on the host",
            "hint": "make it",
            "nodes": 0,
            "descriptors": 0,
            "lost": 0,
            "calls": 7,
            "clock_skew_ms": -5,
            "revalidating": False,
            "unwatched": 0,
            "bytes_read": 0,
            "bytes_written": 0,
        }
    ]


def test_an_error_is_a_sentence_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    show.error(UserError("QEMU is missing.", "install it"))
    show.error(UserError("interrupted"))
    captured = capsys.readouterr()
    assert captured.err == "error: QEMU is missing\nhint: install it\nerror: interrupted\n"
    assert captured.out == ""


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        report("installing packages")
        report("making the initrd")
    captured = capsys.readouterr()
    assert captured.err == "installing packages\nmaking the initrd\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("process", "container", "unit", "shown"),
    [
        ("nginx", "web", "docker.service", "nginx (container web)"),
        ("python3", "", "session-3.scope", "python3 (session-3.scope)"),
        ("python3", "", "", "python3"),
        ("", "web", "docker.service", "container web"),
        ("", "", "ssh.service", "ssh.service"),
    ],
)
def test_who_listens(
    capsys: pytest.CaptureFixture[str], process: str, container: str, unit: str, shown: str
) -> None:
    show.forwards([replace(ROW, process=process, container=container, unit=unit)], everything=True)
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith(f"  {shown}")
