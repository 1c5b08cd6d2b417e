"""The command line and the host agent on the two ends of a real socket; the instance behind it is made up."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import (
    api_server,
    applying,
    disk_requests,
    guest_reload,
    mount_rows,
    mounts,
    rule_text,
    starting,
    state,
    up,
)
from host_agent.api_server import Answers, ApiServer
from host_agent.client import all_forwards, connected, hello
from host_agent.commands import forward, run
from host_agent.configuration import config
from host_agent.configuration.config import InstanceConfig, Wishes
from host_agent.doctor import instance as doctor
from host_agent.doctor.examination import examine
from host_agent.errors import ExitCode, UserError
from host_agent.events import EventLog
from host_agent.forwards import MAX_FORWARDS, MAX_WORD
from host_agent.network_settings import NetworkSettings
from host_agent.paths import Home, InstancePaths
from host_agent.port_rules import changed
from host_agent.rules import MAX_RULES
from host_agent.state import InstanceState
from host_agent.unix_listening import listen_unix
from protocol.api import (
    AddMounts,
    ChangePorts,
    ChangeSocketForwards,
    ContainerUsage,
    DialHost,
    DialName,
    DialTcp,
    DialUnix,
    Disk,
    Event,
    Exec,
    Forward,
    Forwards,
    ForwardState,
    GetForwards,
    GetMounts,
    GetPortSettings,
    GetSocketForwards,
    GetStatus,
    GetUsage,
    GuestInfo,
    GuestUsage,
    InstanceStatus,
    Mount,
    Mounts,
    MountSpec,
    MountState,
    Owner,
    PortRule,
    PortSettings,
    Proto,
    SocketForward,
    SocketRow,
    SocketRows,
    Stage,
    StopInstance,
    Subscribe,
    Target,
    Usage,
    View,
    ViewPlace,
    ViewStage,
)
from protocol.errors import ErrorCode, LinkError, OpenRefused, RpcError
from protocol.link import Link, Role, Service
from protocol.messages import MAX_TEXT
from protocol.muxstream import MuxStream
from tests.host_agent.guest_values import PLAIN

STATUS = InstanceStatus(
    *("default", Stage.RUNNING, "ready", "", "kvm", 2, 1 << 30, 1 << 34, "img", 5, 6, 7.0, 0, True),
    *("d", "d", "/docker.sock", "agentctl"),
)
ROW = Forward(Proto.TCP, "::", 80, "127.0.0.1", 80, ForwardState.LISTENING)


@dataclass
class Instance:
    """What the fake host agent knows."""

    status: InstanceStatus = STATUS
    stops: list[StopInstance] = field(default_factory=list)
    over: trio.Event = field(default_factory=trio.Event)
    refusal: Exception | None = None
    dialled: list[Target] = field(default_factory=list)
    guest: trio.abc.HalfCloseableStream | None = None
    rows: list[Forward] = field(default_factory=lambda: [ROW])
    mounts: list[Mount] = field(default_factory=list)
    mount_failure: Exception | None = None
    ports: PortSettings = field(default_factory=PortSettings)
    port_failure: Exception | None = None
    sockets: list[SocketForward] = field(default_factory=list)
    socket_failure: Exception | None = None
    owners_asked: int = 0
    disk: Disk = field(default_factory=lambda: Disk(20 << 30, 1 << 30, 40 << 30, used=1 << 29))
    disk_failure: Exception | None = None

    async def get_disk(self) -> Disk:
        await trio.lowlevel.checkpoint()
        return self.disk

    async def change_disk(self, size: int) -> Disk:
        if self.disk_failure is not None:
            raise self.disk_failure
        self.disk = replace(self.disk, size=size)
        return await self.get_disk()

    async def compact_disk(self) -> Disk:
        if self.disk_failure is not None:
            raise self.disk_failure
        self.disk = replace(self.disk, given_back=1 << 20)
        return await self.get_disk()

    usage: Usage = field(default_factory=lambda: Usage(0, 0))

    view: View = field(default_factory=lambda: View(ViewStage.OFF, "/somewhere/view", "me"))
    view_failure: Exception | None = None

    notes: list[str] = field(default_factory=list)
    reload_failure: Exception | None = None

    async def reload(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        if self.reload_failure is not None:
            raise self.reload_failure
        return self.notes

    async def get_view(self) -> View:
        await trio.lowlevel.checkpoint()
        return self.view

    async def start_view(self, path: str, owner: str) -> View:
        await trio.lowlevel.checkpoint()
        if self.view_failure is not None:
            raise self.view_failure
        self.view = View(ViewStage.MOUNTED, path, owner, True, places=[ViewPlace("volumes/db", False)])
        return self.view

    async def end_view(self) -> View:
        self.view = View(ViewStage.OFF, self.view.path, "me")
        return await self.get_view()

    async def get_owners(self) -> list[Owner]:
        await trio.lowlevel.checkpoint()
        self.owners_asked += 1
        return [Owner(Proto.TCP, "::", 80, "nginx", "web")]

    async def get_usage(self) -> Usage:
        await trio.lowlevel.checkpoint()
        return self.usage

    async def get_status(self) -> InstanceStatus:
        await trio.lowlevel.checkpoint()
        return self.status

    def get_forwards(self) -> Forwards:
        return Forwards(list(self.rows))

    async def get_mounts(self) -> Mounts:
        await trio.lowlevel.checkpoint()
        return Mounts(list(self.mounts))

    async def add_mounts(self, specs: Sequence[MountSpec]) -> Mounts:
        if self.mount_failure is not None:
            raise self.mount_failure
        self.mounts += [Mount(spec, MountState.MOUNTED) for spec in specs]
        return await self.get_mounts()

    async def remove_mounts(self, guest_paths: Sequence[str]) -> Mounts:
        self.mounts = [mount for mount in self.mounts if mount.spec.guest_path not in guest_paths]
        return await self.get_mounts()

    async def get_sockets(self) -> SocketRows:
        await trio.lowlevel.checkpoint()
        return SocketRows([SocketRow(each, ForwardState.LISTENING) for each in self.sockets])

    async def change_sockets(self, change: ChangeSocketForwards) -> SocketRows:
        if self.socket_failure is not None:
            raise self.socket_failure
        self.sockets = [each for each in self.sockets if each not in change.remove] + change.add
        return await self.get_sockets()

    def change_ports(self, request: ChangePorts) -> PortSettings:
        if self.port_failure is not None:
            raise self.port_failure
        self.ports = changed(self.ports, request)
        return self.ports

    async def stop(self, request: StopInstance) -> None:
        self.stops.append(request)
        await self.over.wait()

    async def dial(self, target: Target) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        self.dialled.append(target)
        if self.refusal is not None:
            raise self.refusal
        guest_end, relayed = trio.testing.memory_stream_pair()
        self.guest = guest_end
        return relayed


@dataclass
class Running:
    instance: Instance
    events: EventLog
    server: ApiServer
    scope: trio.CancelScope
    """Cancelled, the server is gone as after a SIGKILL: without a word of its own."""


@asynccontextmanager
async def served(paths: InstancePaths) -> AsyncIterator[Running]:
    instance, events = Instance(), EventLog()
    answers = Answers(
        instance.get_status,
        instance.get_forwards,
        instance.stop,
        instance.dial,
        instance.get_mounts,
        instance.add_mounts,
        lambda: instance.ports,
        instance.change_ports,
        instance.get_sockets,
        instance.change_sockets,
        instance.get_owners,
        instance.get_disk,
        instance.change_disk,
        instance.compact_disk,
        instance.get_usage,
        instance.reload,
        instance.remove_mounts,
        instance.get_view,
        instance.start_view,
        instance.end_view,
    )
    server = ApiServer(paths.agent_socket, answers, events)
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await server.run(task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield Running(instance, events, server, scope)
        scope.cancel()
    assert not paths.agent_socket.exists()


def listening(events: list[Event]) -> Service:
    async def on_event(event: Event) -> None:
        await trio.lowlevel.checkpoint()
        events.append(event)

    service = Service()
    service.on_notice(Event, on_event)
    return service


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


# --- requests --------------------------------------------------------------------------------------


async def test_the_doctor_asks_what_runs(instance: InstancePaths) -> None:
    with state.locked(instance.lock):
        async with served(instance) as running:
            spec = MountSpec("/srv", "/srv", real_path="/srv")
            running.instance.mounts = [Mount(spec, MountState.FULL, "the host's disk is full", "make room")]
            told = await doctor.ask(instance)
            assert told == doctor.Told(STATUS, tuple(running.instance.mounts), (ROW,))
            diagnosis = await examine(Home(instance.directory.parent.parent), instance)
    found = {finding.topic: finding for finding in diagnosis.findings}
    assert found["folders"].message == "/srv: the host's disk is full"
    assert found["instance"].message == "it runs, and the VM answers"
    assert diagnosis.exit_code != 0


async def test_questions_are_answered(instance: InstancePaths) -> None:
    async with served(instance) as running:
        assert stat.S_IMODE(instance.agent_socket.stat().st_mode) == 0o600
        async with connected(instance) as link:
            assert await link.request(GetStatus()) == STATUS
            assert await link.request(GetForwards()) == Forwards([ROW], total=1)
            assert running.instance.owners_asked == 0
            assert await all_forwards(link, owners=True) == [replace(ROW, process="nginx", container="web")]
            assert running.instance.owners_asked == 1


async def test_the_disk_of_a_running_instance_is_shown_and_changed(instance: InstancePaths) -> None:
    def commands() -> list[Disk]:
        grown = disk_requests.grow(instance, 30 << 30)
        return [grown, disk_requests.show(instance), disk_requests.compact(instance)]

    with state.locked(instance.lock):
        async with served(instance) as running:
            before = running.instance.disk
            grown = replace(before, size=30 << 30)
            assert await trio.to_thread.run_sync(commands) == [
                grown,
                grown,
                replace(grown, given_back=1 << 20),
            ]
            with pytest.raises(UserError, match="never shrinks") as refused:
                await trio.to_thread.run_sync(disk_requests.grow, instance, 20 << 30)
            assert refused.value.exit_code is ExitCode.RESOURCES
            assert await disk_requests.grow_while_running(instance, 40 << 30) == ()
            assert running.instance.disk.size == 40 << 30


@pytest.mark.parametrize(
    ("failure", "code"),
    [(UserError("no", "do that"), ErrorCode.INVALID), (OSError("disk full"), ErrorCode.DENIED)],
)
async def test_a_disk_that_cannot_grow_is_a_sentence(
    instance: InstancePaths, failure: Exception, code: ErrorCode
) -> None:
    with state.locked(instance.lock):
        async with served(instance) as running:
            running.instance.disk_failure = failure
            with pytest.raises(RpcError) as caught:
                await trio.to_thread.run_sync(disk_requests.grow, instance, 30 << 30)
            assert caught.value.code is code
            (warning,) = await disk_requests.grow_while_running(instance, 30 << 30)
            assert str(failure) in warning
            running.instance.disk_failure = UserError("no", "do that")
            with pytest.raises(RpcError, match="no"):
                await trio.to_thread.run_sync(disk_requests.compact, instance)


async def test_the_disk_of_an_instance_of_an_older_agentctl_is_not_touched(instance: InstancePaths) -> None:
    with state.locked(instance.lock):
        async with served(instance) as running:
            # As its server would answer what it has never heard of.
            running.instance.disk_failure = RpcError(ErrorCode.UNSUPPORTED, "no such method")
            with pytest.raises(UserError, match="older agentctl") as caught:
                await trio.to_thread.run_sync(disk_requests.compact, instance)
            assert "agentctl restart" in caught.value.hint


async def test_mounts_are_listed_and_added(instance: InstancePaths) -> None:
    spec = MountSpec("/srv/a", "/a", read_only=True)
    async with served(instance), connected(instance) as link:
        assert await link.request(GetMounts()) == Mounts([])
        added = await link.request(AddMounts([spec]))
        assert added == Mounts([Mount(spec, MountState.MOUNTED)])
        assert await link.request(GetMounts()) == added


@pytest.mark.parametrize(
    ("failure", "code", "message", "hint"),
    [
        (UserError("no room", "make some", ExitCode.USAGE), ErrorCode.INVALID, "no room", "make some"),
        (OSError(28, "No space left"), ErrorCode.DENIED, "the list of mounts could not be saved", ""),
    ],
)
async def test_a_mount_that_cannot_be_is_told_why(
    instance: InstancePaths, failure: Exception, code: ErrorCode, message: str, hint: str
) -> None:
    async with served(instance) as running, connected(instance) as link:
        running.instance.mount_failure = failure
        with pytest.raises(RpcError) as caught:
            await link.request(AddMounts([MountSpec("/a", "/a")]))
        assert (caught.value.code, caught.value.hint) == (code, hint)
        assert caught.value.message.startswith(message)


async def test_sockets_are_listed_and_changed(instance: InstancePaths) -> None:
    one = SocketForward("/guest", "/host")
    async with served(instance) as running, connected(instance) as link:
        assert await link.request(GetSocketForwards()) == SocketRows([])
        changed = await link.request(ChangeSocketForwards(add=[one]))
        assert changed == SocketRows([SocketRow(one, ForwardState.LISTENING)])
        assert await link.request(GetSocketForwards()) == changed
        for failure, code in (
            (UserError("no", "hint"), ErrorCode.INVALID),
            (OSError(28, "x"), ErrorCode.DENIED),
        ):
            running.instance.socket_failure = failure
            with pytest.raises(RpcError) as caught:
                await link.request(ChangeSocketForwards(add=[one]))
            assert caught.value.code is code


RULE = PortRule(guest_port=80, ports=1, host_port=8080)


async def test_the_rules_of_ports_are_asked_for_and_changed(instance: InstancePaths) -> None:
    async with served(instance) as running, connected(instance) as link:
        assert await link.request(GetPortSettings()) == PortSettings()
        wanted = PortSettings([RULE], lan=True, privileged_offset=10000)
        assert await link.request(ChangePorts([RULE], lan=True, privileged_offset=10000)) == wanted
        assert await link.request(GetPortSettings()) == running.instance.ports == wanted


async def test_up_has_settings_of_the_guest_taken_up(instance: InstancePaths) -> None:
    changed = replace(PLAIN, environment=(("A", "1"),))
    config.save_kept(instance.running_config, PLAIN)
    async with served(instance) as running:
        running.instance.status = replace(STATUS, warnings=["not so"])
        running.instance.notes = ["done", "x" * 2 * MAX_TEXT]
        assert await guest_reload.apply(instance, PLAIN) == ("not so",)
        done, long, warning = await guest_reload.apply(instance, changed)
        assert (done, len(long), warning) == ("done", MAX_TEXT, "not so")
        running.instance.reload_failure = UserError("no", "do that")
        with pytest.raises(UserError, match="no") as caught:
            await guest_reload.apply(instance, changed)
        assert caught.value.hint == "do that"
        running.instance.reload_failure = OSError(28, "No space left on device")
        with pytest.raises(UserError, match="No space left"):
            await guest_reload.apply(instance, changed)
        running.instance.reload_failure = RpcError(ErrorCode.UNSUPPORTED, "no such request")
        assert await guest_reload.apply(instance, changed) == (guest_reload.OLDER, "not so")


@pytest.mark.parametrize(
    ("failure", "code"),
    [(UserError("no", "do that"), ErrorCode.INVALID), (OSError("disk full"), ErrorCode.DENIED)],
)
async def test_why_rules_cannot_be_is_told(
    instance: InstancePaths, failure: Exception, code: ErrorCode
) -> None:
    async with served(instance) as running, connected(instance) as link:
        running.instance.port_failure = failure
        with pytest.raises(RpcError) as caught:
            await link.request(ChangePorts([RULE]))
        assert caught.value.code is code


async def test_the_longest_list_of_rules_fits_into_an_answer(instance: InstancePaths) -> None:
    longest = PortRule(
        guest_ip="fd00:" * 7 + "0", guest_port=65535, ports=1, host_port=65535, host_socket="/" + "s" * 106
    )
    rules = [replace(longest, guest_port=port) for port in range(60_000, 60_000 + MAX_RULES)]
    async with served(instance) as running, connected(instance) as link:
        running.instance.ports = PortSettings(rules)
        assert (await link.request(GetPortSettings())).rules == rules


async def test_rules_are_added_removed_and_listed_by_the_command_line(instance: InstancePaths) -> None:
    sockets = [SocketForward("/guest", "/host")]
    with state.locked(instance.lock):
        async with served(instance) as running:
            settings, table = await forward._change_forwards_of_running(
                instance, ChangePorts([RULE]), ChangeSocketForwards(sockets)
            )
            assert settings.rules == running.instance.ports.rules == [RULE]
            assert [row.forward for row in table.rows] == sockets
            await forward._change_forwards_of_running(
                instance, ChangePorts(remove=rule_text.find([RULE], "8080:80")), ChangeSocketForwards()
            )
            assert (await forward._forwards_of_running(instance))[0] == PortSettings()


async def test_up_changes_ports_of_a_running_instance(instance: InstancePaths) -> None:
    wanted = replace(ASKED, lan=True, privileged_offset=10000)
    async with served(instance) as running:
        running.instance.ports = PortSettings([RULE])
        assert await applying.change_ports(instance, wanted) == ()
        assert running.instance.ports == PortSettings([RULE], lan=True, privileged_offset=10000)
        running.instance.port_failure = UserError("no", "do that")
        assert await applying.change_ports(instance, wanted) == (), "nothing is to be changed"
        with pytest.raises(UserError, match="no"):
            await applying.change_ports(instance, ASKED)


async def test_up_applies_rules_that_were_edited_in_the_file(instance: InstancePaths) -> None:
    other = replace(RULE, guest_port=81)
    third = replace(RULE, guest_port=82)
    config.save(instance, replace(ASKED, identity=str(uuid.uuid4()), rules=(other, RULE)))
    async with served(instance) as running:
        running.instance.ports = PortSettings([RULE, third])
        assert await applying.change_ports(instance, ASKED) == ()
        assert running.instance.ports == PortSettings([other, RULE])


async def test_up_applies_sockets_that_were_edited_in_the_file(instance: InstancePaths) -> None:
    old, kept, new = (SocketForward(f"/guest/{name}", f"/host/{name}") for name in ("old", "kept", "new"))
    async with served(instance) as running:
        running.instance.sockets = [old, kept]
        assert await applying.change_sockets(instance, ASKED) == ()
        assert running.instance.sockets == [old, kept], "there is no file"
        config.save(instance, replace(ASKED, identity=str(uuid.uuid4()), sockets=(kept, new)))
        assert await applying.change_sockets(instance, ASKED) == ()
        assert running.instance.sockets == [kept, new]
        running.instance.socket_failure = UserError("it cannot be", "see")
        assert await applying.change_sockets(instance, ASKED) == (), "nothing is to be changed"
        config.save(instance, replace(ASKED, identity=str(uuid.uuid4()), sockets=(new,)))
        with pytest.raises(UserError, match="it cannot be"):
            await applying.change_sockets(instance, ASKED)


async def test_up_says_what_of_the_network_waits_for_a_restart(instance: InstancePaths) -> None:
    asked = replace(ASKED, identity=str(uuid.uuid4()))
    config.save(instance, asked)
    config.save_kept(instance.running_config, asked)
    edited = replace(asked, network=NetworkSettings(proxies="none"))
    async with served(instance) as running:
        status = running.instance.status
        status = replace(status, cpus=asked.cpus, memory=asked.memory, disk=asked.disk)
        for chosen, said in ((asked, []), (edited, ["network"])):
            joined = await trio.to_thread.run_sync(up._joined, instance, status, chosen)
            assert [word for word in ("cpus", "network") if word in " ".join(joined.warnings)] == said


async def test_up_makes_the_disk_larger_and_never_smaller(instance: InstancePaths) -> None:
    asked = replace(ASKED, identity=str(uuid.uuid4()))
    config.save(instance, asked)
    config.save_kept(instance.running_config, asked)
    with state.locked(instance.lock):
        async with served(instance) as running:
            instance_ = running.instance
            instance_.status = replace(STATUS, cpus=asked.cpus, memory=asked.memory, disk=asked.disk)
            larger = replace(asked, disk=2 * asked.disk)
            before, instance_.status = instance_.status, replace(instance_.status, disk=larger.disk)
            joined = await trio.to_thread.run_sync(up._joined, instance, before, larger)
            assert (joined.warnings, joined.status.disk) == ((), larger.disk)
            assert instance_.disk.size == larger.disk
            instance_.disk_failure = UserError("the disk never shrinks", "do not")
            joined = await trio.to_thread.run_sync(up._joined, instance, instance_.status, asked)
            assert joined.warnings == ("the disk never shrinks; do not",)


async def test_what_is_used_fits_into_an_answer_whatever_the_guest_says(instance: InstancePaths) -> None:
    many = [ContainerUsage("x" * 100_000, "ü" * 100_000, 1.0, 2, 3)] * 1000
    async with served(instance) as running, connected(instance) as link:
        assert await link.request(GetUsage()) == Usage(0, 0)
        guest = GuestUsage(1.0, 2, 3.0, 4.0, 5.0, [6.0] * 100_000, *(0,) * 10, containers=many)
        running.instance.usage = Usage(7, 8, guest)
        told = await link.request(GetUsage())
    assert (told.received, told.sent) == (7, 8)
    assert told.guest is not None
    assert told.guest.load == [6.0] * 3
    assert len(told.guest.containers) == api_server.MAX_CONTAINERS
    assert {len(each.name) for each in told.guest.containers} == {MAX_WORD}


async def test_the_longest_table_of_mounts_fits_into_an_answer(instance: InstancePaths) -> None:
    path = "/" + "p" * (mounts.MAX_PATH - 1)
    words = "\U0001f600" * mount_rows.MAX_WORDS
    spec = MountSpec(path, path, real_path=path)
    row = Mount(spec, MountState.FAILED, words, words, 1 << 60, 1 << 60, 1 << 60, 1 << 60)
    async with served(instance) as running, connected(instance) as link:
        running.instance.mounts = [row] * mounts.MAX_MOUNTS
        assert len((await link.request(GetMounts())).mounts) == mounts.MAX_MOUNTS


# --- folders ---------------------------------------------------------------------------------------


ASKED = InstanceConfig(cpus=2, memory=1 << 30, disk=1 << 34, accelerator="auto", identity="", mounts=())


async def test_up_mounts_what_a_running_instance_lacks(instance: InstancePaths) -> None:
    here, there = MountSpec("/srv/here", "/srv/here"), MountSpec("/srv/there", "/there")
    async with served(instance) as running:
        running.instance.mounts = [Mount(here, MountState.MOUNTED)]
        assert await applying.mount_more(instance, replace(ASKED, mounts=(here, there))) == ()
        assert [mount.spec for mount in running.instance.mounts] == [here, there]


async def test_up_takes_nothing_away_and_says_so(instance: InstancePaths) -> None:
    here, other = MountSpec("/srv/here", "/srv/here"), MountSpec("/other", "/other")
    async with served(instance) as running:
        running.instance.mounts = [Mount(here, MountState.MOUNTED), Mount(other, MountState.MOUNTED)]
        only = replace(ASKED, mounts=(replace(here, read_only=True),))
        (warning,) = await applying.mount_more(instance, only)
        assert warning.startswith(
            "/other, /srv/here: unchanged until you restart the instance: agentctl restart"
        )
        assert [mount.spec for mount in running.instance.mounts] == [here, other]


async def test_up_says_which_folders_the_vm_does_not_see(instance: InstancePaths) -> None:
    lost = Mount(MountSpec("/a", "/b"), MountState.MISSING, "/a is missing on the host", "make it")
    async with served(instance) as running:
        running.instance.mounts = [lost, Mount(MountSpec("/c", "/c"), MountState.MOUNTED)]
        expected = ("/b is not mounted: /a is missing on the host (make it)",)
        assert await applying.mounts_after_start(instance) == expected
        assert (await applying.mount_more(instance, replace(ASKED, mounts=(lost.spec,))))[1:] == expected
    assert await applying.mounts_after_start(instance) == ()


async def test_up_says_of_which_folders_the_vm_sees_another_one(
    instance: InstancePaths, tmp_path: Path
) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("new")
    moved = MountSpec(str(tmp_path / "link"), "/src", real_path=str(tmp_path / "old"))
    sound = MountSpec(str(tmp_path / "link"), "/same", real_path=str(tmp_path / "new"))
    async with served(instance) as running:
        running.instance.mounts = [
            Mount(moved, MountState.MOUNTED, "it was moved", "ask again"),
            Mount(sound, MountState.MOUNTED, "the clock is off"),
        ]
        assert await applying.mounts_after_start(instance) == ("/src: it was moved (ask again)",)


async def test_a_mount_that_cannot_be_added_is_an_error_of_up(instance: InstancePaths) -> None:
    async with served(instance) as running:
        running.instance.mount_failure = UserError("no room", "make some")
        with pytest.raises(UserError, match="no room") as caught:
            await applying.mount_more(instance, replace(ASKED, mounts=(MountSpec("/a", "/a"),)))
        assert caught.value.hint == "make some"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the user is; the shell's name for it is the real one."""
    real = os.path.realpath(tmp_path)
    monkeypatch.chdir(real)
    monkeypatch.setenv("PWD", real)
    return real


def test_up_adds_the_working_directory_unless_folders_were_named(home: Home, folder: str) -> None:
    outside = (MountSpec("/home/me", "/home/me"),)
    added = up._folders(home, Wishes(), replace(ASKED, mounts=outside))
    assert added.specs == (*outside, MountSpec(folder, folder))
    assert folder in added.note
    named = up._folders(home, Wishes(mounts=outside), replace(ASKED, mounts=outside))
    assert named.specs == outside
    assert folder in named.warning
    assert not named.note
    inside = (MountSpec(folder, "/src"),)
    for wishes in (Wishes(), Wishes(mounts=inside)):
        assert up._folders(home, wishes, replace(ASKED, mounts=inside)).specs == inside


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (MountState.MOUNTED, "/src"),
        (MountState.FULL, "/src"),
        (MountState.WAITING, ""),
        (MountState.MISSING, ""),
    ],
)
async def test_a_command_runs_where_the_user_is(
    instance: InstancePaths, folder: str, state: MountState, expected: str
) -> None:
    async with served(instance) as running, connected(instance) as link:
        assert await run._shared_directory(link) is None
        running.instance.mounts = [Mount(MountSpec(folder, "/src"), state)]
        assert await run._shared_directory(link) == expected


async def test_a_command_runs_at_home_if_the_working_directory_was_deleted(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "here", lambda: None)
    async with served(instance), connected(instance) as link:
        assert await run._shared_directory(link) is None


# As long as a guest can make them, and as wide as text can be.
LONGEST = replace(ROW, guest_address="x" * MAX_WORD, unit="x" * MAX_WORD, reason="\U0001f600" * MAX_WORD)


@pytest.mark.parametrize("count", [0, 1, 5000])
async def test_a_table_of_any_length_is_answered_in_pieces(instance: InstancePaths, count: int) -> None:
    rows = [replace(LONGEST, guest_port=port) for port in range(count)]
    async with served(instance) as running:
        running.instance.rows = rows
        async with connected(instance) as link:
            assert await all_forwards(link) == rows


async def test_a_piece_is_bounded_by_its_bytes_and_there_is_always_some_of_it(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [replace(ROW, guest_port=port) for port in range(3)]
    monkeypatch.setattr(api_server, "MAX_PIECE", 2 * api_server._encoded_size(ROW))
    async with served(instance) as running:
        running.instance.rows = [*short, LONGEST]
        async with connected(instance) as link:
            assert await link.request(GetForwards()) == Forwards(short[:2], total=4)
            assert await link.request(GetForwards(2)) == Forwards(short[2:], total=4)
            assert await link.request(GetForwards(3)) == Forwards([LONGEST], total=4)
            assert await link.request(GetForwards(4)) == Forwards([], total=4)
            for offset in (-1, 5):
                with pytest.raises(RpcError) as caught:
                    await link.request(GetForwards(offset))
                assert caught.value.code is ErrorCode.INVALID


async def test_the_pieces_are_of_one_moment(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server, "MAX_PIECE", 1)
    second = replace(ROW, guest_port=81)
    async with served(instance) as running:
        running.instance.rows = [ROW, second]
        async with connected(instance) as link:
            assert (await link.request(GetForwards())).forwards == [ROW]
            running.instance.rows = [replace(ROW, guest_port=1), ROW, second]
            assert await link.request(GetForwards(1)) == Forwards([second], total=2)
            assert len(await all_forwards(link)) == 3


async def test_an_agent_that_knows_nothing_of_pieces_gives_them_all_at_once() -> None:
    async def old(_: GetForwards) -> Forwards:
        await trio.lowlevel.checkpoint()
        return Forwards([ROW, ROW])

    service = Service()
    service.on_request(GetForwards, old)
    ours, theirs = trio.testing.memory_stream_pair()
    link = Link(ours, Role.CLIENT, Service(), hello("agentctl"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Link(theirs, Role.SERVER, service, hello("agentctl-host")).run)
        await nursery.start(link.run)
        assert await all_forwards(link) == [ROW, ROW]
        nursery.cancel_scope.cancel()


async def test_the_guests_words_never_make_a_status_too_long(instance: InstancePaths) -> None:
    long = "\U0001f600" * 200_000
    guest = GuestInfo(long, 5.0, 1, 1, 2, 3, 4, long)
    async with served(instance) as running:
        running.instance.status = replace(STATUS, detail=long, hint=long, guest_digest=long, guest=guest)
        async with connected(instance) as link:
            status = await link.request(GetStatus())
    assert status.guest is not None
    for text in (
        status.detail,
        status.hint,
        status.guest_digest,
        status.guest.kernel,
        status.guest.port_detection,
    ):
        assert len(text) == MAX_TEXT
        assert text.endswith("…")
    assert replace(status, detail="ready", hint="", guest_digest="d", guest=None) == STATUS


async def test_clients_do_not_disturb_each_other(instance: InstancePaths) -> None:
    async with served(instance) as running:
        async with connected(instance) as first:
            async with connected(instance) as second:
                assert await second.request(GetStatus()) == STATUS
            # One that sends nonsense, and one that goes without a word.
            for words in (b"GET / HTTP/1.1\r\n\r\n" * 10, b""):
                async with await trio.open_unix_socket(str(instance.agent_socket)) as stranger:
                    await stranger.send_all(words)
            running.instance.status = replace(STATUS, detail="changed")
            assert (await first.request(GetStatus())).detail == "changed"


async def test_stop_is_answered_when_it_is_done_even_though_the_agent_ends_then(
    instance: InstancePaths,
) -> None:
    async with served(instance) as running:

        async def end() -> None:
            await until(lambda: running.instance.stops)
            # As the host agent does it: the last word right after the deed.
            running.instance.over.set()
            await running.server.farewell("stopped")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            async with connected(instance) as link:
                await link.request(StopInstance(force=True), timeout=5)
        assert running.instance.stops == [StopInstance(force=True)]


async def test_the_last_events_arrive_before_the_farewell(instance: InstancePaths) -> None:
    heard: list[Event] = []
    async with served(instance) as running:
        with pytest.raises(UserError, match="the connection to instance default was lost"):
            async with connected(instance, listening(heard)) as link:
                await link.request(Subscribe())
                running.events.say("failed", "no image")
                await running.server.farewell("failed")
                await trio.sleep_forever()
    assert [event.kind for event in heard] == ["failed"]


async def test_a_farewell_to_those_who_are_just_leaving(instance: InstancePaths) -> None:
    async with served(instance) as running:
        async with connected(instance) as link:
            await link.request(GetStatus())
        await running.server.farewell("stopped")
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                with suppress(UserError):
                    async with connected(instance) as link:
                        await link.request(Subscribe())
                        nursery.start_soon(running.server.farewell, "stopped")
                        await link.goodbye("me first")
        with trio.fail_after(5):
            await running.server.farewell("stopped again")


# --- events ----------------------------------------------------------------------------------------


async def test_events_so_far_come_first_then_those_that_happen(instance: InstancePaths) -> None:
    heard: list[Event] = []
    async with served(instance) as running:
        running.events.say("stage", "booting")
        running.events.say("boot-stage", "guest: kernel")
        async with connected(instance, listening(heard)) as link:
            await link.request(Subscribe())
            running.events.say("stage", "ready", stage="running")
            await until(lambda: len(heard) == 3)
    assert [event.message for event in heard] == ["booting", "guest: kernel", "ready"]
    assert heard[2].fields == {"stage": "running"}


async def test_who_did_not_subscribe_hears_nothing(instance: InstancePaths) -> None:
    heard: list[Event] = []
    async with served(instance) as running:
        async with connected(instance, listening(heard)) as link:
            running.events.say("stage", "booting")
            await link.request(GetStatus())
    assert heard == []


async def test_a_subscriber_that_left_is_forgotten_at_once(instance: InstancePaths) -> None:
    async with served(instance) as running:
        for _ in range(3):
            async with connected(instance) as link:
                await link.request(Subscribe())
                assert len(running.events._listeners) == 1
            await until(lambda: not running.events._listeners)
        assert running.server._links == set()


async def test_all_ports_may_change_at_once(instance: InstancePaths) -> None:
    """Closed here, open there: so many events before anything is sent. (A quarter of them, for the time it takes.)"""
    assert api_server.MAX_BEHIND >= 2 * MAX_FORWARDS
    numbers = [str(number) for number in range(MAX_FORWARDS // 2)]
    heard: list[Event] = []
    async with served(instance) as running:
        async with connected(instance, listening(heard)) as link:
            await link.request(Subscribe())
            for number in numbers:
                running.events.say("port-listening", "0.0.0.0:8080 is forwarded to the VM", port=number)
            with trio.fail_after(60):
                while len(heard) < len(numbers):
                    await trio.sleep(0.01)
    assert [event.fields["port"] for event in heard] == numbers


async def test_a_subscriber_that_does_not_keep_up_is_dropped(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_server, "MAX_BEHIND", 4)
    async with served(instance) as running:
        with pytest.raises(UserError, match="was lost"):
            async with connected(instance) as link:
                await link.request(Subscribe())
                for number in range(6):  # more at once than it may be behind
                    running.events.say("port", str(number))
                await trio.sleep_forever()
        assert running.events._listeners == []
        async with connected(instance) as link:
            assert await link.request(GetStatus()) == STATUS


# --- exec ------------------------------------------------------------------------------------------


async def test_a_stream_is_relayed_both_ways_with_its_ends(instance: InstancePaths) -> None:
    target = Exec(["cat"], env={"A": "b"})
    async with served(instance) as running:
        async with connected(instance) as link:
            client = await link.open(target)
            assert running.instance.dialled == [target]
            guest = running.instance.guest
            assert guest is not None
            await client.send_all(b"in")
            await client.send_eof()
            assert await guest.receive_some() == b"in"
            assert await guest.receive_some() == b""
            await guest.send_all(b"out")
            await guest.send_eof()
            assert await client.receive_some() == b"out"
            assert await client.receive_some() == b""


@pytest.mark.parametrize(
    ("refusal", "code", "message"),
    [
        (
            OpenRefused(ErrorCode.NOT_FOUND, "no such command", "try ls"),
            ErrorCode.NOT_FOUND,
            "no such command",
        ),
        (LinkError("not reachable for 20 s"), ErrorCode.UNREACHABLE, "not reachable for 20 s"),
    ],
)
async def test_why_a_stream_cannot_be_is_passed_on(
    instance: InstancePaths, refusal: Exception, code: ErrorCode, message: str
) -> None:
    async with served(instance) as running:
        running.instance.refusal = refusal
        async with connected(instance) as link:
            with pytest.raises(OpenRefused, match=message) as caught:
                await link.open(Exec(["x"]))
            assert caught.value.code is code
            assert caught.value.hint


@pytest.mark.parametrize("target", [DialTcp("172.17.0.2", 80), DialName("web", 80)])
async def test_a_connection_in_the_guest_is_relayed_as_well(instance: InstancePaths, target: Target) -> None:
    async with served(instance) as running, connected(instance) as link:
        async with await link.open(target) as client:
            assert running.instance.dialled == [target]
            await client.send_all(b"in")
            assert running.instance.guest is not None
            assert await running.instance.guest.receive_some() == b"in"


async def test_nothing_else_can_be_opened(instance: InstancePaths) -> None:
    async with served(instance) as running:
        async with connected(instance) as link:
            for target in (DialUnix("/run/docker.sock"), DialHost("/g")):
                with pytest.raises(OpenRefused):
                    await link.open(target)
        assert running.instance.dialled == []


async def test_a_client_that_leaves_takes_its_process_with_it(instance: InstancePaths) -> None:
    async with served(instance) as running:
        async with connected(instance) as link:
            await link.open(Exec(["sleep"]))
        guest = running.instance.guest
        assert guest is not None
        with trio.fail_after(5), suppress(trio.BrokenResourceError):
            assert await guest.receive_some() == b""


async def test_a_client_that_leaves_before_the_answer_leaves_nothing_behind(instance: InstancePaths) -> None:
    waiting, proceed = trio.Event(), trio.Event()
    async with served(instance) as running:
        dial = running.instance.dial

        async def slowly(target: Target) -> trio.abc.HalfCloseableStream:
            waiting.set()
            with trio.CancelScope(shield=True):
                await proceed.wait()
                return await dial(target)

        running.server._answers = replace(running.server._answers, dial=slowly)
        async with trio.open_nursery() as nursery:

            async def ask() -> MuxStream | None:
                async with connected(instance) as link:
                    return await link.open(Exec(["sleep"]))

            nursery.start_soon(ask)
            await waiting.wait()
            nursery.cancel_scope.cancel()
        proceed.set()
        await until(lambda: running.instance.guest is not None)
        assert running.instance.guest is not None
        with trio.fail_after(5), suppress(trio.BrokenResourceError):
            assert await running.instance.guest.receive_some() == b""


# --- the client ------------------------------------------------------------------------------------


async def test_nobody_there(instance: InstancePaths) -> None:
    instance.agent_socket.touch()  # what a power cut leaves
    with pytest.raises(UserError, match="instance default is not running") as caught:
        async with connected(instance, patience=60):
            pass
    assert caught.value.exit_code is ExitCode.NOT_RUNNING
    assert caught.value.hint == "start it: agentctl up"


async def test_an_agent_that_is_being_started_is_waited_for(instance: InstancePaths) -> None:
    with state.locked(instance.lock):
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.sleep(0.2)
                async with served(instance):
                    await trio.sleep_forever()

            nursery.start_soon(later)
            async with connected(instance, patience=10) as link:
                assert await link.request(GetStatus()) == STATUS
            nursery.cancel_scope.cancel()


async def test_patience_has_an_end(instance: InstancePaths) -> None:
    with state.locked(instance.lock):
        with trio.fail_after(5), pytest.raises(UserError, match="is not running"):
            async with connected(instance, patience=0.1):
                pass


@pytest.mark.parametrize("in_good_order", [True, False])
async def test_losing_the_agent_ends_what_waits_for_it(instance: InstancePaths, in_good_order: bool) -> None:
    async with served(instance) as running:
        with trio.fail_after(5), pytest.raises(UserError, match="instance default was lost") as caught:
            async with connected(instance) as link:
                await link.request(GetStatus())
                if in_good_order:
                    await running.server.farewell("stopped")
                else:
                    running.scope.cancel()
                await trio.sleep_forever()
        assert caught.value.hint == "see: agentctl status"
        assert caught.value.exit_code is ExitCode.GENERAL


async def test_a_request_that_was_under_way_fails_with_a_sentence(instance: InstancePaths) -> None:
    async with served(instance) as running:
        with trio.fail_after(5), pytest.raises(UserError, match="instance default was lost"):
            async with connected(instance) as link:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(link.request, StopInstance())
                    await until(lambda: running.instance.stops)
                    running.scope.cancel()


async def test_an_agent_of_another_major_version(instance: InstancePaths) -> None:
    async def old(transport: trio.abc.Stream) -> None:
        theirs = replace(hello("agentctl-host"), major=hello("x").major + 1)
        with suppress(LinkError):
            await Link(transport, Role.SERVER, Service(), theirs).run()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, old, [listen_unix(instance.agent_socket)])
        with pytest.raises(UserError, match="of another version of agentctl") as caught:
            async with connected(instance):
                pass
        assert caught.value.hint == "restart it: agentctl stop --force, then agentctl up"
        nursery.cancel_scope.cancel()


async def test_errors_of_the_one_who_uses_it_come_through(instance: InstancePaths) -> None:
    async with served(instance):
        with pytest.raises(ZeroDivisionError):
            async with connected(instance):
                raise ZeroDivisionError
        with pytest.raises(RpcError):
            async with connected(instance):
                raise RpcError(ErrorCode.TIMEOUT, "no answer")


# --- how `up` follows a start ------------------------------------------------------------------------


@asynccontextmanager
async def one_that_starts(paths: InstancePaths) -> AsyncIterator[Running]:
    async with served(paths) as running:
        running.instance.status = replace(STATUS, stage=Stage.STARTING)
        with state.locked(paths.lock):
            yield running


async def test_up_follows_a_start_to_its_end(instance: InstancePaths) -> None:
    told: list[str] = []
    result: list[InstanceStatus] = []
    async with one_that_starts(instance) as running:
        running.events.say("stage", "booting the VM", stage="booting")
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                result.append(await starting._follow_start(instance, told.append))

            nursery.start_soon(follow)
            await until(lambda: told)
            running.events.say("booted", "the guest agent is connected")
            await until(lambda: len(told) == 2)
            running.instance.status = STATUS
            running.events.say("stage", "ready", stage="running")
    assert told == ["booting the VM", "the guest agent is connected"]
    assert result == [STATUS]


@pytest.mark.parametrize(
    ("kind", "fields", "message", "code"),
    [
        ("failed", {"code": "7", "hint": "look"}, "it broke", ExitCode.BOOT),
        ("failed", {"code": "99", "hint": "look"}, "it broke", ExitCode.GENERAL),
        ("docker-failed", {"hint": "look"}, "it broke", ExitCode.DOCKER),
        ("stage", {"stage": "stopping"}, "instance default was stopped while it started", ExitCode.BUSY),
    ],
)
async def test_up_says_why_a_start_failed(
    instance: InstancePaths, kind: str, fields: dict[str, str], message: str, code: ExitCode
) -> None:
    async with one_that_starts(instance) as running:
        running.events.say(kind, "it broke", **fields)
        with trio.fail_after(5), pytest.raises(UserError, match=message) as caught:
            await starting._follow_start(instance, lambda text: None)
    assert caught.value.exit_code is code
    assert caught.value.hint == fields.get("hint", "")


async def test_up_finds_the_reason_that_a_lost_agent_left(instance: InstancePaths) -> None:
    state.save(instance.state, InstanceState(failure="the VM panicked", hint="see", failure_code=7))
    with trio.fail_after(5), pytest.raises(UserError, match="the VM panicked") as caught:
        await starting._follow_start(instance, lambda text: None)
    assert (caught.value.exit_code, caught.value.hint) == (ExitCode.BOOT, "see")


async def test_up_follows_the_agent_that_takes_the_place_of_a_killed_one(instance: InstancePaths) -> None:
    state.save(instance.state, InstanceState(wanted=True))
    result: list[InstanceStatus] = []

    async def follow() -> None:
        result.append(await starting._follow_start(instance, lambda text: None))

    with trio.fail_after(5), state.locked(instance.lock):
        async with trio.open_nursery() as nursery:
            async with served(instance) as running:
                nursery.start_soon(follow)
                await until(lambda: running.events._listeners)
            async with served(instance) as successor:
                await until(lambda: successor.events._listeners)
                successor.events.say("stage", "ready", stage="running")
                await until(lambda: result)
    assert result == [STATUS]


async def test_up_does_not_wait_for_an_agent_that_was_killed_with_its_keeper(instance: InstancePaths) -> None:
    state.save(instance.state, InstanceState(wanted=True))
    failures: list[UserError] = []

    async def follow() -> None:
        try:
            await starting._follow_start(instance, lambda text: None)
        except UserError as error:
            failures.append(error)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            async with served(instance) as running:
                nursery.start_soon(follow)
                await until(lambda: running.events._listeners)
    assert [failure.message for failure in failures] == [
        "the connection to instance default was lost: the host agent has ended"
    ]


async def test_a_second_up_gets_the_instance_that_runs(instance: InstancePaths) -> None:
    assert await starting.running(instance, lambda text: None) is None
    async with one_that_starts(instance) as running:
        running.instance.status = STATUS
        assert await starting.running(instance, lambda text: None) == STATUS


async def test_up_during_stop_is_told_to_come_back(instance: InstancePaths) -> None:
    async with one_that_starts(instance) as running:
        running.instance.status = replace(STATUS, stage=Stage.STOPPING)
        with pytest.raises(UserError, match="is just stopping") as caught:
            await starting.running(instance, lambda text: None)
    assert caught.value.exit_code is ExitCode.BUSY


async def test_an_interrupted_start_is_ended_by_force(instance: InstancePaths) -> None:
    state.save(instance.state, InstanceState(wanted=True))
    async with one_that_starts(instance) as running:
        running.instance.over.set()
        await starting.abandon(instance)
        assert running.instance.stops == [StopInstance(force=True)]
    assert not state.load(instance.state).wanted


async def test_abandoning_what_never_came_to_life(instance: InstancePaths) -> None:
    with trio.fail_after(5):
        await starting.abandon(instance)
    assert not state.load(instance.state).wanted
