"""The control link of a VM over SSH: both agents, a port that can be lost, and a real sshd; only the VM is played."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from guest_agent import agent as guest_module
from guest_agent import system
from guest_agent.agent import Agent
from host_agent import control_path, fallback, state
from host_agent.cleanup import remember
from host_agent.client import hello
from host_agent.fallback import Fallback
from host_agent.guest_link import GuestLink
from host_agent.paths import Home, InstancePaths
from protocol import execio
from protocol.api import Exec, GetGuestInfo, Transport
from protocol.link import Link, Service
from protocol.serial import SocketPort
from tests.remote.sshd import Client, Sshd, account, make_key, public

REPOSITORY = Path(__file__).parents[2]

PATIENCE = 60.0


class Port:
    """QEMU and its virtio-serial port: what the host says is the guest's to read, while there is a port."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guest_ends = trio.open_memory_channel[trio.SocketStream](1)
        self._plugged = trio.Event()
        self._pulled = trio.CancelScope()
        self._silent = False
        self._all: list[trio.SocketStream] = []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(self._path))
            listener.listen()
            task_status.started()
            while True:
                connection, _ = await listener.accept()
                async with trio.SocketStream(connection) as host:
                    await self._serve(host)

    async def _serve(self, host: trio.SocketStream) -> None:
        while True:
            await self._plugged.wait()
            ours, theirs = trio.socket.socketpair()
            async with trio.SocketStream(ours) as guest:
                with trio.CancelScope() as self._pulled:
                    await self._guest_ends[0].send(self._given(trio.SocketStream(theirs)))
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._carry, host, guest)
                        nursery.start_soon(self._carry, guest, host)
            if self._plugged.is_set() or not self._silent:
                return

    def _given(self, end: trio.SocketStream) -> trio.SocketStream:
        self._all.append(end)
        return end

    async def aclose(self) -> None:
        """Also what was given to nobody."""
        for end in self._all:
            await trio.aclose_forcefully(end)

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            while data := await source.receive_some():
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._pulled.cancel()

    async def open_transport(self) -> SocketPort:
        """The guest's device."""
        return SocketPort(await self._guest_ends[1].receive())

    def plug(self) -> None:
        self._plugged.set()

    def pull(self, *, silent: bool = False) -> None:
        """It is away for the guest. The host is hung up on, and answered no more; or only that, as after device_del."""
        self._plugged, self._silent = trio.Event(), silent
        self._pulled.cancel()


class Monitor:
    """What QEMU's user network is told; its forwarded port is sshd's own."""

    def __init__(self, sshd: Sshd) -> None:
        self._sshd = sshd
        self.open: list[int] = []
        self.opened = 0

    async def execute(self, command: str, arguments: dict[str, str]) -> str:
        await trio.lowlevel.checkpoint()
        assert command == "human-monitor-command"
        match arguments["command-line"].split():
            case ["hostfwd_add", "net", "tcp:127.0.0.1:0-10.0.2.15:22"]:
                self.open.append(self._sshd.port)
                self.opened += 1
            case ["hostfwd_remove", "net", rule]:
                self.open.remove(int(rule.removeprefix("tcp:127.0.0.1:")))
            case ["info", "usernet"]:
                rows = [
                    f"  TCP[HOST_FORWARD]  13  127.0.0.1 {port}  10.0.2.15  22  0  0" for port in self.open
                ]
                return "\r\n".join(["Hub -1 (net):", *rows, ""])
        return ""


class Vm:
    def __init__(self, sshd: Sshd) -> None:
        self.network = Monitor(sshd)
        self.state = "running"
        self.lives = True

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        yield self.network

    def alive(self) -> bool:
        return self.lives

    async def run_state(self) -> str:
        await trio.lowlevel.checkpoint()
        return self.state


@dataclass
class House:
    """Host and VM."""

    paths: InstancePaths
    link: GuestLink
    fallback: Fallback
    port: Port
    vm: Vm
    sshd: Sshd
    attending: trio.CancelScope
    told: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def say(self, kind: str, message: str, **fields: str) -> None:
        assert kind == "control-link"
        self.told.append((message, fields))

    @property
    def states(self) -> list[str]:
        return [fields["state"] for _, fields in self.told]

    async def goes_over(self, transport: Transport) -> None:
        await until(lambda: self.fallback.control.transport is transport)

    async def works(self) -> None:
        link = await self.link.wait(PATIENCE)
        assert (await link.request(GetGuestInfo())).cpus >= 1
        async with await link.open(Exec(["sh", "-c", "echo hello"])) as stream:
            packets = execio.Decoder().receive_data(b"".join([data async for data in stream]))
        assert packets == [execio.Stdout(b"hello\n"), execio.Exit(0)]

    def logins(self) -> int:
        return len(psutil.Process(self.sshd.pid).children())


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.sleep(0.02)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ac-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def sshd() -> Iterator[Sshd]:
    with Sshd(environment={"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}) as running:
        yield running


@pytest.fixture
def liveness() -> dict[str, float]:
    """How soon a session finds out that nobody answers, if not in its usual time."""
    return {}


@pytest.fixture
async def house(
    folder: Path,
    sshd: Sshd,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    liveness: dict[str, float],
) -> AsyncIterator[House]:
    monkeypatch.setattr(control_path, "LOST_AFTER", 0.5)
    monkeypatch.setattr(control_path, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(fallback, "KEY_INTERVAL", 0.1)
    monkeypatch.setattr(guest_module, "DOOR_AFTER", 0.1)
    keys = folder / "keys"
    keys.mkdir()
    shutil.copy(sshd.host_key.with_suffix(".pub"), keys / "ssh_host_ed25519_key.pub")
    monkeypatch.setattr(system, "HOST_KEYS", str(keys))
    # Nothing of the user's is used, whatever it says.
    home = Client.make(folder / "home")
    home.configure("Host *\n  ProxyCommand false\n  IdentityFile /nowhere")
    monkeypatch.setenv("HOME", str(home.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    paths = InstancePaths(Home(folder / "h").instance().directory)
    paths.directory.mkdir(parents=True, mode=0o700)
    sshd.authorize(public(make_key(paths.ssh_key)))
    port = Port(paths.control_socket)
    await nursery.start(port.run)
    port.plug()

    agent = Agent(nursery)
    nursery.start_soon(agent.ports.run)
    await nursery.start(agent.entrances.run)
    nursery.start_soon(partial(agent.serve, port.open_transport, 0.1))
    nursery.start_soon(agent.serve_door, folder / "door")

    async def on_up(link: Link) -> None:
        await link.request(GetGuestInfo())

    link = GuestLink(paths.control_socket, hello("host"), Service(), on_up=on_up, on_down=lambda: None)
    monkeypatch.setattr(link, "_open_link", partial(link._open_link, **liveness))
    vm = Vm(sshd)
    command = shlex.join([sys.executable, "-P", "-m", "guest_agent.ssh_door", str(folder / "door")])

    def say(kind: str, message: str, **fields: str) -> None:
        house.say(kind, message, **fields)

    way = Fallback(paths, link, lambda: vm, say, command=command, user=account())
    house = House(paths, link, way, port, vm, sshd, trio.CancelScope())
    nursery.start_soon(link.run)
    nursery.start_soon(way.run)

    async def attend() -> None:
        with house.attending:
            await way.attend(vm)

    await house.goes_over(Transport.VIRTIO_SERIAL)
    nursery.start_soon(attend)
    await until(lambda: state.load(paths.state).host_keys == public(sshd.host_key))
    yield house
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await port.aclose()


@pytest.mark.parametrize("liveness", [{"heartbeat": 0.5, "dead_after": 6.0}])
async def test_a_port_that_falls_silent_is_replaced_by_ssh_and_returns(house: House) -> None:
    await house.works()
    assert (house.told, house.vm.network.opened, house.logins()) == ([], 0, 0)
    house.port.pull(silent=True)
    await house.goes_over(Transport.SSH)
    await house.works()
    control = house.fallback.control
    assert control.reason
    assert (control.problem, control.attempts) == ("", 0)
    assert house.told[0] == (
        f"the control link goes over SSH: {control.reason}",
        {"state": "ssh", "reason": control.reason},
    )
    assert house.vm.network.open == []
    sessions = house.link.sessions

    house.port.plug()
    await house.goes_over(Transport.VIRTIO_SERIAL)
    await house.works()
    await until(lambda: house.logins() == 0)
    assert house.states == ["ssh", "virtio-serial"]
    assert (house.fallback.control.reason, house.vm.network.opened) == ("", 1)
    assert house.link.sessions == sessions + 1


async def test_a_connection_that_is_lost_is_made_again(house: House) -> None:
    house.port.pull()
    await house.goes_over(Transport.SSH)
    house.sshd.end_connections()
    await until(lambda: house.vm.network.opened == 2)
    await house.goes_over(Transport.SSH)
    await house.works()
    assert house.states == ["ssh"]


async def test_what_is_in_the_way_is_said_until_it_is_not(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def problem(words: str) -> None:
        await until(lambda: words in house.fallback.control.problem)
        assert house.link.current is None
        assert house.vm.network.open == []

    house.sshd.stop()
    house.port.pull()
    await problem("the VM's SSH server is not reached: Connection refused")
    told = state.load(house.paths.state).host_keys
    house.sshd.change_host_key()
    house.sshd.start()
    await problem("another host key")
    attempts = house.fallback.control.attempts
    await until(lambda: house.fallback.control.attempts > attempts)
    assert "Accepted" not in house.sshd.log()
    assert house.states == ["none"] * 2  # each reason once, and not with each attempt
    assert house.fallback.hopeless

    allowed = house.sshd.authorized_keys.read_text()
    house.sshd.authorized_keys.write_text("")
    assert public(house.sshd.host_key) != told
    remember(house.paths, host_keys=public(house.sshd.host_key))
    await problem("does not let the instance's key in")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(house.fallback, "_command", "echo no agent runs here >&2; exit 3")
        house.sshd.authorize(allowed)
        await problem("no agent runs here")
    await house.goes_over(Transport.SSH)
    await house.works()
    house.port.plug()
    await house.goes_over(Transport.VIRTIO_SERIAL)
    await house.works()
    assert house.states == [*["none"] * 4, "ssh", "virtio-serial"]


async def test_a_vm_that_stands_still_is_left_alone(house: House) -> None:
    house.vm.state = "io-error"
    house.port.pull()
    await until(lambda: house.link.current is None)
    await trio.sleep(2)
    assert (house.vm.network.opened, house.fallback.control.attempts) == (0, 0)
    house.vm.state = "running"
    await house.goes_over(Transport.SSH)


async def test_a_stop_keeps_the_session_and_tries_nothing_new(house: House) -> None:
    house.port.pull()
    await house.goes_over(Transport.SSH)
    house.attending.cancel()
    await trio.sleep(0.5)
    await house.works()
    house.sshd.end_connections()
    await until(lambda: house.link.current is None)
    await trio.sleep(1)
    assert house.vm.network.opened == 1


async def test_with_the_vm_ends_all_of_it(house: House) -> None:
    house.port.pull()
    await house.goes_over(Transport.SSH)
    house.vm.lives = False
    house.attending.cancel()
    await until(lambda: house.logins() == 0)
    assert house.link.current is None
    assert house.fallback.control.transport is Transport.NONE


async def test_a_port_left_open_by_a_killed_agent_is_closed(house: House, nursery: trio.Nursery) -> None:
    house.vm.network.open = [5, 6]
    nursery.start_soon(house.fallback.attend, house.vm)
    await until(lambda: house.vm.network.open == [])


def test_nothing_of_ssh_is_imported_while_the_port_works() -> None:
    program = "import sys, host_agent.daemon; assert not {'asyncssh', 'asyncio'} & set(sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", program) == 0
