"""The QEMU process: started, adopted, watched and ended; scripts stand in where QEMU must misbehave."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import trio
import trio.testing

from host_agent import vm as vms
from host_agent.console import (
    BootStage,
    ConsoleEvent,
    ConsoleWatcher,
    Farewell,
    Panicked,
    Stalled,
    limits_for,
)
from host_agent.errors import ExitCode, UserError
from host_agent.process import ProcessIdentity
from host_agent.qmp import QmpClosed, QmpError
from host_agent.vm import BootFailure, RebootPolicy, RestartPolicy, VirtualMachine, VmFiles, watch_boot
from provision.machine import MIB, Accelerator, Machine

QEMU = shutil.which("qemu-system-x86_64")
KERNEL = os.environ.get("AGENTCTL_TEST_KERNEL")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="needs AGENTCTL_TEST_KERNEL, an x86-64 bzImage")

IDLE = "exec sleep 1000"


@pytest.fixture
def files(tmp_path: Path) -> VmFiles:
    return VmFiles(
        identity=tmp_path / "qemu.json",
        qmp=tmp_path / "qmp.sock",
        console=tmp_path / "console.log",
        log=tmp_path / "qemu.log",
    )


def empty_machine(files: VmFiles) -> list[str]:
    """A real QEMU with nothing in it but its monitor."""
    # fmt: off
    return [
        str(QEMU), "-M", "none", "-S", "-nodefaults", "-display", "none",
        "-chardev", f"socket,id=qmp,path={files.qmp},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
    ]
    # fmt: on


def script(body: str) -> list[str]:
    return ["/bin/sh", "-c", body]


@asynccontextmanager
async def running(argv: list[str], files: VmFiles) -> AsyncIterator[VirtualMachine]:
    vm = await VirtualMachine.start(argv, files)
    try:
        yield vm
    finally:
        with trio.CancelScope(shield=True):
            await vm.kill()


async def until_it_answers(vm: VirtualMachine) -> None:
    with trio.fail_after(30):
        while True:
            try:
                async with vm.monitor():
                    return
            except QmpClosed:
                await trio.sleep(0.01)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


# --- start -----------------------------------------------------------------------------------------


async def test_start_records_who_it_is_and_detaches_it(files: VmFiles) -> None:
    async with running(script(IDLE), files) as vm:
        pid = vm.identity.pid
        assert vm.alive()
        assert os.getsid(pid) == pid
        assert json.loads(files.identity.read_text()) == {"pid": pid, "birth": vm.identity.birth}
        assert ProcessIdentity.of(pid) == vm.identity
    assert not vm.alive()


@needs_qemu
async def test_what_qemu_creates_is_private(files: VmFiles) -> None:
    async with running(empty_machine(files), files) as vm:
        await until_it_answers(vm)
        for path in (files.qmp, files.log):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


@needs_qemu
async def test_who_listens_to_qemu_leaves_its_monitor_to_others(files: VmFiles, tmp_path: Path) -> None:
    files = replace(files, events=tmp_path / "events.sock")
    second = [
        "-chardev",
        f"socket,id=events,path={files.events},server=on,wait=off",
        "-mon",
        "chardev=events,mode=control",
    ]
    async with running([*empty_machine(files), *second], files) as vm:
        await until_it_answers(vm)
        with trio.fail_after(30):
            async with vm.events() as events:
                await vm.resume()
                assert (await anext(events)).name == "RESUME"
                assert await vm.run_state() == "running"
                await vm.kill()
                assert [event.name async for event in events] == []
        with pytest.raises(QmpClosed):
            async with vm.events():
                pass


async def test_a_vm_of_before_there_were_events_has_none(files: VmFiles) -> None:
    async with running(script(IDLE), files) as vm:
        with pytest.raises(QmpClosed):
            async with vm.events():
                pass


@needs_qemu
async def test_a_disk_in_use_grows_and_a_node_that_is_not_there_is_an_error(
    files: VmFiles, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    drive = ["-blockdev", f"driver=raw,node-name=data,file.driver=file,file.filename={disk},discard=unmap"]
    async with running([*empty_machine(files), *drive], files) as vm:
        await until_it_answers(vm)
        await vm.resize("data", 3 * MIB)
        assert disk.stat().st_size == 3 * MIB
        with pytest.raises(QmpError):
            await vm.resize("nobody", 4 * MIB)


async def test_previous_logs_are_kept_once(files: VmFiles) -> None:
    for number in range(3):
        files.console.write_text(f"console {number}")
        async with running(script(f"echo log {number}"), files) as vm:
            await vm.wait()
    assert not files.console.exists()
    assert files.console.with_name("console.log.1").read_text() == "console 2"
    assert files.log.read_text() == "log 2\n"
    assert files.log.with_name("qemu.log.1").read_text() == "log 1\n"


@pytest.mark.parametrize("kind", ["missing", "not executable"])
async def test_a_qemu_that_cannot_be_run_is_a_user_error(files: VmFiles, tmp_path: Path, kind: str) -> None:
    qemu = tmp_path / "qemu"
    if kind == "not executable":
        qemu.write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="qemu cannot be run") as caught:
        await VirtualMachine.start([str(qemu)], files)
    assert caught.value.exit_code is ExitCode.DEPENDENCY
    assert caught.value.hint
    assert not files.identity.exists()


async def test_a_log_that_cannot_be_written_is_a_user_error(files: VmFiles) -> None:
    files.log.touch()
    files.log.with_name("qemu.log.1").mkdir()
    with pytest.raises(UserError, match=r"qemu\.log cannot be written") as caught:
        await VirtualMachine.start(script(IDLE), files)
    assert caught.value.exit_code is ExitCode.RESOURCES


async def test_an_open_folder_is_refused(files: VmFiles, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o750)
    with pytest.raises(UserError, match="open to other users") as caught:
        await VirtualMachine.start(script(IDLE), files)
    assert "chmod 700" in caught.value.hint


async def test_a_second_start_is_refused_and_a_stale_record_is_not(files: VmFiles) -> None:
    async with running(script(IDLE), files) as vm:
        with pytest.raises(UserError, match=f"already running .QEMU has pid {vm.identity.pid}") as caught:
            await VirtualMachine.start(script(IDLE), files)
        assert caught.value.exit_code is ExitCode.BUSY
    async with running(script(IDLE), files) as again:
        assert again.identity != vm.identity


async def test_a_record_that_cannot_be_written_leaves_nothing_running(
    files: VmFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    spawn = vms._spawn

    def observed(*args: object) -> subprocess.Popen[bytes]:
        started.append(spawn(*args))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(vms, "_spawn", observed)
    files.identity.mkdir()  # nothing can be renamed over a folder
    with pytest.raises(UserError, match="cannot be written") as caught:
        await VirtualMachine.start(script(IDLE), files)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert started[0].returncode == -signal.SIGKILL


# --- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        ("exit 0", "QEMU ended normally"),
        (
            "echo; echo 'qemu: disk is locked' >&2; echo; exit 1",
            "QEMU exited with status 1: qemu: disk is locked",
        ),
        ("exit 3", "QEMU exited with status 3"),
        ("echo words >&2; kill -KILL $$", "QEMU was killed by signal 9 (SIGKILL)"),
        ("echo cause >&2; ulimit -c 0; kill -ABRT $$", "QEMU was killed by signal 6 (SIGABRT): cause"),
    ],
)
async def test_how_it_ended_is_told(files: VmFiles, body: str, ending: str) -> None:
    vm = await VirtualMachine.start(script(body), files)
    assert await vm.wait() == ending
    assert await vm.wait() == ending


async def test_a_panic_is_the_reason_even_if_qemu_exits_normally(files: VmFiles) -> None:
    body = f"echo '[ 9.1] Kernel panic - not syncing: Attempted to kill init!' >'{files.console}'"
    vm = await VirtualMachine.start(script(body), files)
    assert await vm.wait() == (
        "the guest's kernel panicked: Kernel panic - not syncing: Attempted to kill init!"
    )


REBOOTS = "[ 9.1] reboot: Restarting system"
PANICS = "[ 9.0] Kernel panic - not syncing: Attempted to kill init!"


@pytest.mark.parametrize(
    ("lines", "then", "farewell", "adopted"),
    [
        ([REBOOTS], "exit 0", Farewell.REBOOT, Farewell.REBOOT),
        (["[ 9.1] reboot: Power down"], "exit 0", Farewell.POWER_OFF, Farewell.POWER_OFF),
        # Told to quit, or by a kernel of few words. Its parent knows that it was in good order, and no other.
        (["x"], "exit 0", Farewell.POWER_OFF, None),
        (["x"], "exit 1", None, None),
        # To QEMU this is a reboot, because of panic=-1.
        ([PANICS], "exit 0", None, None),
        ([REBOOTS, PANICS], "exit 0", None, None),
        ([REBOOTS], "kill -KILL $$", None, Farewell.REBOOT),
    ],
)
async def test_what_the_guest_ended_it_for(
    files: VmFiles, lines: list[str], then: str, farewell: Farewell | None, adopted: Farewell | None
) -> None:
    vm = await VirtualMachine.start(says(files, *lines, then=then), files)
    await vm.wait()
    assert vm.farewell() is farewell
    assert VirtualMachine(vm.identity, files).farewell() is adopted


@needs_qemu
async def test_a_killed_qemu_is_noticed_by_all_who_wait(files: VmFiles) -> None:
    async with running(empty_machine(files), files) as vm:
        endings = []

        async def wait() -> None:
            endings.append(await vm.wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(vm.identity.pid, signal.SIGKILL)
        assert endings == ["QEMU was killed by signal 9 (SIGKILL)"] * 2


@needs_qemu
async def test_quit_lets_qemu_end_in_good_order(files: VmFiles) -> None:
    async with running(empty_machine(files), files) as vm:
        await until_it_answers(vm)
        assert await vm.quit() == "QEMU ended normally"
        assert await vm.quit() == "QEMU ended normally"


async def test_quit_kills_what_has_no_monitor(files: VmFiles) -> None:
    async with running(script(IDLE), files) as vm:
        assert await vm.quit() == "QEMU was killed by signal 9 (SIGKILL)"


class ScriptedMonitor:
    """A monitor that accepts every command and remembers its name."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    async def serve(
        self, path: Path, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen()
            await trio.serve_listeners(
                self._session, [trio.SocketListener(listener)], task_status=task_status
            )

    async def _session(self, stream: trio.SocketStream) -> None:
        await stream.send_all(b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}}}\r\n')
        buffer = b""
        async for data in stream:
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                command = json.loads(line)
                self.commands.append(command["execute"])
                await stream.send_all(json.dumps({"return": {}, "id": command["id"]}).encode() + b"\n")


async def test_powerdown_presses_the_button(files: VmFiles) -> None:
    monitor = ScriptedMonitor()
    async with running(script(IDLE), files) as vm, trio.open_nursery() as nursery:
        await nursery.start(monitor.serve, files.qmp)
        await vm.powerdown()
        assert monitor.commands == ["qmp_capabilities", "system_powerdown"]
        assert vm.alive()
        nursery.cancel_scope.cancel()


async def test_quit_kills_what_does_not_obey(files: VmFiles, autojump_clock: trio.testing.MockClock) -> None:
    monitor = ScriptedMonitor()
    async with running(script(IDLE), files) as vm, trio.open_nursery() as nursery:
        await nursery.start(monitor.serve, files.qmp)
        assert await vm.quit(timeout=7) == "QEMU was killed by signal 9 (SIGKILL)"
        assert trio.current_time() == pytest.approx(7)
        assert monitor.commands == ["qmp_capabilities", "quit"]
        nursery.cancel_scope.cancel()


# --- adoption --------------------------------------------------------------------------------------


@needs_qemu
async def test_a_running_qemu_is_adopted(files: VmFiles) -> None:
    async with running(empty_machine(files), files) as vm:
        await until_it_answers(vm)
        adopted = await VirtualMachine.adopt(files)
        assert adopted is not None
        assert adopted.identity == vm.identity
        async with adopted.monitor() as monitor:
            assert (await monitor.execute("query-status"))["status"] == "prelaunch"
        assert await adopted.quit() == "QEMU ended"
        assert await VirtualMachine.adopt(files) is None


@needs_qemu
async def test_qemu_outlives_the_host_agent_and_is_adopted(files: VmFiles) -> None:
    """The host agent is a process of its own here; SIGKILL, and SIGINT to its group, end only it."""
    agent = f"""
import trio, os, signal
from pathlib import Path
from host_agent.vm import VirtualMachine, VmFiles
files = VmFiles(*map(Path, {[str(path) for path in (files.identity, files.qmp, files.console, files.log)]}))
async def main():
    vm = await VirtualMachine.start({empty_machine(files)}, files)
    os.killpg(0, signal.SIGKILL)
trio.run(main)
"""
    died = await trio.run_process([sys.executable, "-c", agent], check=False, start_new_session=True)
    assert died.returncode == -signal.SIGKILL
    vm = await VirtualMachine.adopt(files)
    assert vm is not None
    assert vm.alive()
    assert await vm.kill() == "QEMU ended"
    assert not vm.alive()


async def test_a_recycled_pid_is_neither_adopted_nor_killed(
    files: VmFiles, stranger: subprocess.Popen[bytes]
) -> None:
    predecessor = ProcessIdentity(stranger.pid, "another boot:1")
    files.identity.write_text(json.dumps({"pid": predecessor.pid, "birth": predecessor.birth}))
    assert await VirtualMachine.adopt(files) is None
    vm = VirtualMachine(predecessor, files)
    assert await vm.kill() == "QEMU ended"
    assert await vm.quit() == "QEMU ended"
    assert stranger.poll() is None


@pytest.mark.parametrize(
    "record",
    [None, b"", b"\xff", b"[]", b"{}", b'{"pid": "x", "birth": "y"}', b'{"pid": 1e999, "birth": ""}'],
)
async def test_a_record_that_cannot_be_read_is_none(files: VmFiles, record: bytes | None) -> None:
    if record is not None:
        files.identity.write_bytes(record)
    assert await VirtualMachine.adopt(files) is None


async def test_a_qemu_without_a_monitor_is_ended(
    files: VmFiles, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(script(IDLE), files) as vm:
        assert await VirtualMachine.adopt(files) is None
        assert not vm.alive()
        assert trio.current_time() == pytest.approx(vms.ADOPT_TIMEOUT)
    assert "whose monitor does not answer" in caplog.text


@needs_qemu
async def test_a_qemu_that_is_still_starting_is_adopted(files: VmFiles) -> None:
    argv = script(f"sleep 0.3; exec {shlex.join(empty_machine(files))}")
    async with running(argv, files) as vm:
        adopted = await VirtualMachine.adopt(files)
        assert adopted is not None
        assert adopted.identity == vm.identity


@needs_qemu
async def test_a_qemu_that_hangs_is_ended(files: VmFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vms, "ADOPT_TIMEOUT", 0.2)
    async with running(empty_machine(files), files) as vm:
        with trio.fail_after(30):
            while not files.qmp.exists():
                await trio.sleep(0.01)
        vm.identity.send_signal(signal.SIGSTOP)
        assert await VirtualMachine.adopt(files) is None
        assert await vm.wait() == "QEMU was killed by signal 9 (SIGKILL)"


# --- boot ------------------------------------------------------------------------------------------


def watcher() -> ConsoleWatcher:
    return ConsoleWatcher(limits_for(Accelerator.KVM), trio.current_time())


def says(files: VmFiles, *lines: str, then: str = IDLE) -> list[str]:
    """A guest that prints ``lines`` on its console."""
    quoted = " ".join(f"'{line}'" for line in lines)
    return script(f"printf '%s\\r\\n' {quoted} >'{files.console}'; {then}")


async def test_a_boot_is_over_when_the_guest_is_connected(files: VmFiles) -> None:
    events: list[ConsoleEvent] = []
    connected = trio.Event()

    def report(event: ConsoleEvent) -> None:
        events.append(event)
        connected.set()

    async with running(says(files, "Linux version 6.12"), files) as vm:
        assert await watch_boot(vm, watcher(), connected, report) is None
        assert vm.alive()
    assert [type(event).__name__ for event in events] == ["StageReached"]


async def test_a_panicked_guest_is_killed(files: VmFiles) -> None:
    """It prints its panic and then spins, as seen with TCG."""
    events: list[ConsoleEvent] = []
    argv = says(files, "Linux version 6.12", "[ 1.0] Kernel panic - not syncing: Fatal exception", "Offset")
    async with running(argv, files) as vm:
        failure = await watch_boot(vm, watcher(), trio.Event(), events.append)
        assert not vm.alive()
    assert failure == BootFailure(
        "the guest's kernel panicked: Kernel panic - not syncing: Fatal exception",
        ("Linux version 6.12", "[ 1.0] Kernel panic - not syncing: Fatal exception", "Offset"),
    )
    assert events[-1] == Panicked("Kernel panic - not syncing: Fatal exception")


async def test_a_panic_is_not_lost_when_qemu_ends_at_once(files: VmFiles) -> None:
    vm = await VirtualMachine.start(says(files, "Kernel panic - not syncing: now", then="exit 0"), files)
    await vm.wait()
    failure = await watch_boot(vm, watcher(), trio.Event(), lambda event: None)
    assert failure is not None
    assert failure.reason == "the guest's kernel panicked: Kernel panic - not syncing: now"


async def test_a_stalled_guest_is_killed(files: VmFiles, autojump_clock: trio.testing.MockClock) -> None:
    events: list[ConsoleEvent] = []
    async with running(script(IDLE), files) as vm:
        failure = await watch_boot(vm, watcher(), trio.Event(), events.append)
        assert not vm.alive()
    assert failure is not None
    assert failure.reason == "the guest said nothing for 6 s in stage firmware"
    assert [type(event) for event in events] == [Stalled]
    assert trio.current_time() == pytest.approx(6, abs=0.2)


async def test_a_qemu_that_ends_during_the_boot_is_a_failure(files: VmFiles) -> None:
    argv = says(files, "Linux version 6.12", then="echo 'qemu: no disk' >&2; exit 1")
    async with running(argv, files) as vm:
        failure = await watch_boot(vm, watcher(), trio.Event(), lambda event: None)
    assert failure == BootFailure("QEMU exited with status 1: qemu: no disk", ("Linux version 6.12",))


@needs_qemu
@needs_kernel
async def test_a_real_machine_without_a_root_panics(files: VmFiles, tmp_path: Path) -> None:
    """The whole of it with a real kernel: argv, start, console, panic, end."""
    for name in ("initrd", "agent.tar"):
        (tmp_path / name).write_bytes(b"")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "root.qcow2"), "1M"]
    await trio.run_process(create)
    machine = Machine(
        accelerator=Accelerator.TCG,
        uuid=uuid4(),
        cpus=2,
        memory=256 * MIB,
        kernel=Path(str(KERNEL)),
        initrd=tmp_path / "initrd",
        root=tmp_path / "root.qcow2",
        agent=tmp_path / "agent.tar",
        qmp=files.qmp,
        console=files.console,
    )
    events: list[ConsoleEvent] = []
    watch = ConsoleWatcher(limits_for(Accelerator.TCG), trio.current_time())
    async with running(machine.argv(Path(str(QEMU))), files) as vm:
        failure = await watch_boot(vm, watch, trio.Event(), events.append)
    assert failure is not None
    assert "VFS: Unable to mount root fs" in failure.reason, failure
    assert watch.stage is BootStage.KERNEL
    assert [type(event).__name__ for event in events] == ["StageReached", "Panicked"]


# --- one more try ----------------------------------------------------------------------------------

FAILURE = BootFailure(
    "the guest said nothing for 6 s in stage kernel", ("[ 1.0] smp: Bringing up", "[ 1.1] x")
)


def test_one_bad_boot_is_tried_again_and_counted() -> None:
    policy = RestartPolicy()
    assert policy.retry(FAILURE) == (
        "The VM did not boot (the guest said nothing for 6 s in stage kernel); starting it again, try 2 of 2."
    )
    assert policy.restarts == 1
    with pytest.raises(
        UserError, match=r"does not boot: the guest said nothing .* last words: . 1.1. x"
    ) as caught:
        policy.retry(FAILURE)
    assert caught.value.exit_code is ExitCode.BOOT
    assert policy.restarts == 1


def test_after_a_good_boot_the_next_bad_one_is_the_first() -> None:
    policy = RestartPolicy()
    policy.retry(FAILURE)
    policy.booted()
    policy.retry(BootFailure("QEMU ended", ()))
    assert policy.restarts == 2


# --- a guest that reboots --------------------------------------------------------------------------


def test_a_guest_may_reboot_as_often_as_it_likes() -> None:
    policy = RebootPolicy()
    for _ in range(100):
        policy.rebooted(vms.SHORT_LIFE)


def test_one_that_does_nothing_else_is_not_started_again() -> None:
    policy = RebootPolicy(allowed=2)
    policy.rebooted(1)
    policy.rebooted(1)
    policy.rebooted(vms.SHORT_LIFE + 1)
    policy.rebooted(1)
    policy.rebooted(vms.SHORT_LIFE - 1)
    with pytest.raises(UserError, match="rebooted 3 times in a row within 120 s of its boot") as caught:
        policy.rebooted(1)
    assert caught.value.exit_code is ExitCode.BOOT
    assert caught.value.hint
