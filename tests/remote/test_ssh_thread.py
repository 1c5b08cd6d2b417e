"""The SSH thread against a real sshd: who is let in and who is believed, and bytes that arrive."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from host_agent import clock_jumps
from host_agent.errors import UserError
from host_agent.remote import bridge, connection, ssh_config, ssh_line, ssh_thread
from host_agent.remote.failures import Refused, Unreachable
from host_agent.remote.machine import Address
from host_agent.remote.ssh_thread import Finished, SshLines
from protocol.api import LinkState
from tests.delay_line import DelayLine
from tests.remote.sshd import Client, Sshd, account, agent, known_as, make_key, program, public

PATIENCE = 60.0
MIB = 1024 * 1024


@pytest.fixture
def sshd() -> Iterator[Sshd]:
    with Sshd() as running:
        yield running


@pytest.fixture
def folder() -> Iterator[Path]:
    """For sockets: its name is short."""
    with tempfile.TemporaryDirectory(prefix="ac-") as name:
        yield Path(name)


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Whose home this process has; nothing of the machine's own SSH is left."""
    made = Client.make(folder / "home")
    monkeypatch.setenv("HOME", str(made.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(ssh_config, "SYSTEM", folder / "etc")
    monkeypatch.setattr(ssh_line, "LONGEST_PAUSE", 1.0)
    return made


@pytest.fixture
def address(sshd: Sshd) -> Address:
    return Address(sshd.address, account(), sshd.port)


class Person:
    """Answers what is asked, and writes down what that was."""

    def __init__(self, answers: dict[str, str] | None = None, trusts: bool = False) -> None:
        self.answers = answers or {}
        self.trusts = trusts
        self.asked: list[str] = []

    def ask(self, question: str, *, secret: bool) -> str | None:
        self.asked.append(question)
        return self.answers.get(question)

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        self.asked.append(f"{host} {key_type} {fingerprint}")
        return self.trusts


async def says(address: Address, prompts: connection.Prompts | None = None) -> str:
    """What the machine answers to a first question."""
    with trio.fail_after(PATIENCE):
        async with ssh_thread.opened(address, prompts) as line:
            await line.connect()
            return (await line.run("echo hello")).out.decode().strip()


async def refusal(address: Address, prompts: connection.Prompts | None = None) -> UserError:
    with pytest.raises(UserError) as raised:
        await says(address, prompts)
    return raised.value


# Who is believed, and who is let in.


async def test_a_known_machine_lets_a_key_in(sshd: Sshd, client: Client, address: Address) -> None:
    client.may_enter(sshd)
    assert await says(address) == "hello"


async def test_an_unknown_machine_is_refused_with_its_fingerprint(
    sshd: Sshd, client: Client, address: Address
) -> None:
    sshd.authorize(public(client.key))
    error = await refusal(address)
    listed = [program("ssh-keygen"), "-lf", str(sshd.host_key) + ".pub"]
    fingerprint = (await trio.run_process(listed, capture_stdout=True)).stdout.decode().split()[1]
    assert isinstance(error, Refused)
    assert f"{known_as(sshd.address, sshd.port)} is not known here" in error.message
    assert fingerprint in error.message
    assert f"ssh -p {sshd.port} {account()}@{sshd.address}" in error.hint
    assert client.known_hosts.read_text() == ""


async def test_a_key_that_somebody_trusts_is_remembered(sshd: Sshd, client: Client, address: Address) -> None:
    sshd.authorize(public(client.key))
    client.known_hosts.write_text("# the last line has no end")
    person = Person(trusts=True)
    assert await says(address, person) == "hello"
    assert len(person.asked) == 1
    assert await says(address, nobody := Person()) == "hello"
    assert nobody.asked == []
    # ssh itself reads what was written.
    argv = [program("ssh"), *client.options(), "-p", str(sshd.port), f"{account()}@{sshd.address}", "true"]
    with trio.fail_after(PATIENCE):
        await trio.run_process(argv)


async def test_a_key_that_nobody_trusts_is_not_remembered(
    sshd: Sshd, client: Client, address: Address
) -> None:
    sshd.authorize(public(client.key))
    assert isinstance(await refusal(address, Person(trusts=False)), Refused)
    assert client.known_hosts.read_text() == ""


async def test_another_key_than_the_known_one_is_refused_and_nobody_is_asked(
    sshd: Sshd, client: Client, address: Address
) -> None:
    client.may_enter(sshd)
    sshd.stop()
    sshd.change_host_key()
    sshd.start()
    error = await refusal(address, person := Person(trusts=True))
    assert isinstance(error, Refused)
    assert "shows another key" in error.message
    assert f"ssh-keygen -R '{known_as(sshd.address, sshd.port)}'" in error.hint
    assert person.asked == []


async def test_a_machine_that_shows_a_key_of_another_kind_has_changed(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    """Not one more unknown key: whoever is in between would just show a key of another kind."""
    sshd.authorize(public(client.key))
    other = make_key(folder / "other", "ecdsa")
    client.known_hosts.write_text(f"{known_as(sshd.address, sshd.port)} {public(other)}\n")
    error = await refusal(address, person := Person(trusts=True))
    assert "shows another key" in error.message
    assert person.asked == []


async def test_a_key_known_for_the_standard_port_is_believed(
    sshd: Sshd, client: Client, address: Address
) -> None:
    sshd.authorize(public(client.key))
    client.known_hosts.write_text(f"this is no entry\n{sshd.address} {public(sshd.host_key)}\n")
    assert await says(address) == "hello"


async def test_a_revoked_key_is_refused(sshd: Sshd, client: Client, address: Address) -> None:
    client.may_enter(sshd)
    name = known_as(sshd.address, sshd.port)
    with client.known_hosts.open("a") as hosts:
        hosts.write(f"@revoked {name} {public(sshd.host_key)}\n")
    error = await refusal(address, person := Person(trusts=True))
    assert "revoked" in error.message
    assert person.asked == []


async def test_the_systems_known_hosts_count(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    sshd.authorize(public(client.key))
    (folder / "etc").mkdir()
    (folder / "etc/ssh_known_hosts").write_text(
        f"{known_as(sshd.address, sshd.port)} {public(sshd.host_key)}\n"
    )
    assert await says(address) == "hello"


async def test_a_configuration_that_believes_everyone_is_not_followed(
    sshd: Sshd, client: Client, address: Address
) -> None:
    """asyncssh takes "none" for leave to check nothing."""
    sshd.authorize(public(client.key))
    client.configure("StrictHostKeyChecking no\nUserKnownHostsFile none\nGlobalKnownHostsFile none")
    assert "is not known here" in (await refusal(address)).message


async def test_who_has_no_key_is_told(sshd: Sshd, client: Client, address: Address) -> None:
    client.trust(sshd)
    error = await refusal(address)
    assert isinstance(error, Refused)
    assert f"lets {account()} in with none of the keys" in error.message


async def test_a_port_where_nobody_listens(sshd: Sshd, client: Client, address: Address) -> None:
    sshd.stop()
    error = await refusal(address)
    assert isinstance(error, Unreachable)
    assert "refuses connections" in error.message


async def test_a_machine_that_says_nothing(
    sshd: Sshd, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        connection.connect, "__kwdefaults__", {**connection.connect.__kwdefaults__, "patience": 0.5}
    )
    with DelayLine(f"{sshd.address}:{sshd.port}") as line:
        line.cut()
        error = await refusal(Address("127.0.0.1", account(), line.port))
    assert isinstance(error, Unreachable)
    assert "has not answered within" in error.message


async def test_an_alias_of_the_configuration(sshd: Sshd, client: Client) -> None:
    sshd.authorize(public(client.key))
    client.key.rename(client.key.with_name("mine"))
    client.configure(
        f"Host box\n HostName {sshd.address}\n Port {sshd.port}\n User {account()}\n HostKeyAlias the-box\n"
        " IdentityFile ~/.ssh/missing\n IdentityFile ~/.ssh/mine\n ProxyJump none\n ProxyCommand none\n"
        " RemoteCommand echo never\n RequestTTY force\n ForwardAgent yes"
    )
    client.known_hosts.write_text(f"the-box {public(sshd.host_key)}\n")
    assert await says(Address("box")) == "hello"


async def test_a_configuration_that_cannot_be_read_is_named(client: Client, address: Address) -> None:
    client.configure("Port many")
    error = await refusal(address)
    assert isinstance(error, Refused)
    assert "~/.ssh/config cannot be used" in error.message


async def test_a_system_configuration_that_cannot_be_read_is_left_out(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    (folder / "etc").mkdir()
    (folder / "etc/ssh_config").write_text("Port many\n")
    assert await says(address) == "hello"


async def test_a_key_of_an_agent(
    sshd: Sshd, client: Client, address: Address, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.trust(sshd)
    held = make_key(folder / "held")
    sshd.authorize(public(held))
    with agent(held) as socket_path:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket_path))
        assert await says(address) == "hello"
        # Only its public key is here, and no other key of the agent's may be tried.
        shutil.copy(held.with_suffix(".pub"), client.folder / "held.pub")
        client.configure("IdentitiesOnly yes\nIdentityFile ~/.ssh/held.pub")
        assert await says(address) == "hello"
        client.configure("IdentityAgent none")
        assert isinstance(await refusal(address), Refused)


async def test_a_machine_that_has_seen_enough_keys_is_not_shown_them_again(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Sshd(settings=["MaxAuthTries 1"]) as sshd, agent(make_key(folder / "another")) as socket_path:
        client.may_enter(sshd)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket_path))
        error = await refusal(Address(sshd.address, account(), sshd.port))
    assert isinstance(error, Refused)
    assert "had seen enough keys" in error.message
    assert "IdentitiesOnly" in error.hint


async def test_an_agent_that_is_gone_is_no_obstacle(
    sshd: Sshd, client: Client, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.may_enter(sshd)
    monkeypatch.setenv("SSH_AUTH_SOCK", "/nonexistent/agent")
    assert await says(address) == "hello"


@pytest.fixture
def locked(client: Client) -> str:
    """The client's key has a passphrase; what is asked for it."""
    client.key.unlink()
    client.key.with_suffix(".pub").unlink()
    make_key(client.key, passphrase="open sesame")
    return "Passphrase of the key ~/.ssh/id_ed25519"


async def test_a_key_with_a_passphrase_is_asked_for(
    sshd: Sshd, client: Client, address: Address, locked: str
) -> None:
    client.may_enter(sshd)
    person = Person({locked: "open sesame"})
    assert await says(address, person) == "hello"
    assert person.asked == [locked]


async def test_a_wrong_passphrase_is_said(sshd: Sshd, client: Client, address: Address, locked: str) -> None:
    client.may_enter(sshd)
    error = await refusal(address, Person({locked: "open barley"}))
    assert isinstance(error, Refused)
    assert "passphrase is missing or wrong" in error.message


async def test_without_anybody_to_ask_a_locked_key_is_none(
    sshd: Sshd, client: Client, address: Address, locked: str
) -> None:
    client.may_enter(sshd)
    assert "none of the keys" in (await refusal(address)).message


async def test_through_a_second_machine(sshd: Sshd, client: Client, address: Address) -> None:
    with Sshd() as jump:
        sshd.authorize(public(client.key))
        jump.authorize(public(client.key))
        client.configure(
            f"Host far\n HostName {sshd.address}\n Port {sshd.port}\n ProxyJump {account()}@near"
        )
        client.configure(f"Host near\n HostName {jump.address}\n Port {jump.port}")
        far = Address("far", account())
        # Each is to be believed by itself.
        assert known_as(jump.address, jump.port) in (await refusal(far)).message
        client.trust(jump)
        assert known_as(sshd.address, sshd.port) in (await refusal(far)).message
        assert await says(far, Person(trusts=True)) == "hello"
        assert await says(far) == "hello"
        jump.stop()
        assert isinstance(await refusal(far), Unreachable)


async def test_through_a_command(sshd: Sshd, client: Client) -> None:
    client.may_enter(sshd)
    with Sshd() as jump:
        client.may_enter(jump)
        words = [
            program("ssh"),
            *client.options(),
            "-W",
            "%h:%p",
            "-p",
            str(jump.port),
            f"{account()}@{jump.address}",
        ]
        client.configure(
            f"Host far\n HostName {sshd.address}\n Port {sshd.port}\n ProxyCommand {' '.join(words)}"
        )
        assert await says(Address("far", account())) == "hello"


async def test_jumps_in_a_circle(client: Client) -> None:
    client.configure("Host a\n ProxyJump b\nHost b\n ProxyJump a")
    assert "in a circle" in (await refusal(Address("a"))).message


# What is run.


@asynccontextmanager
async def standing(address: Address) -> AsyncIterator[SshLines]:
    with trio.fail_after(2 * PATIENCE):
        async with ssh_thread.opened(address) as line:
            await line.connect()
            yield line


async def test_commands(sshd: Sshd, client: Client, address: Address) -> None:
    client.may_enter(sshd)
    async with standing(address) as line:
        assert await line.run("cat; echo no >&2; exit 7", b"yes") == Finished(7, b"yes", b"no\n")
        data = os.urandom(3 * MIB)
        assert (await line.run("cat", data)).out == data
        assert (await line.run("kill -9 $$")).status is None
        assert await line.run("true", bytes(20 * MIB)) == Finished(0, b"", b"")  # it does not read that
        with pytest.raises(Unreachable, match="within 1 s"):
            await line.run("sleep 100", timeout=1)
        with pytest.raises(Unreachable, match="has said more than"):
            await line.run("cat /dev/zero")
        assert (await line.run("echo still here")).out == b"still here\n"


async def test_a_command_is_no_longer_waited_for_when_cancelled(
    sshd: Sshd, client: Client, address: Address
) -> None:
    client.may_enter(sshd)
    async with standing(address) as line:
        with trio.move_on_after(0.2):
            await line.run("sleep 100", timeout=1000)
        assert (await line.run("echo next")).out == b"next\n"


# What is carried.


@asynccontextmanager
async def carried(
    line: SshLines, path: Path, command: str, ended: list[Finished] | None = None
) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(line.carry, path, command, None if ended is None else ended.append)
        yield
        nursery.cancel_scope.cancel()


async def connected(path: Path) -> trio.SocketStream:
    """As the link does it: again and again."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                return await trio.open_unix_socket(str(path))
            except OSError:
                await trio.sleep(0.02)


async def exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size and (data := await stream.receive_some(size - len(received))):
        received += data
    return bytes(received)


async def reaches(path: Path, question: bytes = b"there?") -> bool:
    """Whether a client gets its own words back, now or after it has tried a while."""
    with trio.fail_after(PATIENCE):
        while True:
            async with await connected(path) as stream:
                with trio.move_on_after(PATIENCE / 3):
                    try:
                        await stream.send_all(question)
                        if await exactly(stream, len(question)) == question:
                            return True
                    except trio.BrokenResourceError:
                        pass
            await trio.sleep(0.05)


async def test_bytes_arrive_unchanged_both_ways_at_once(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    sent, received = hashlib.sha256(), hashlib.sha256()
    size = 48 * MIB
    async with standing(address) as line, carried(line, folder / "s", "exec cat"):
        stream = await connected(folder / "s")

        async def send() -> None:
            for number in range(size // MIB):
                block = os.urandom(MIB - number) + bytes(number)
                sent.update(block)
                await stream.send_all(block)

        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            left = size
            while left:
                data = await stream.receive_some()
                assert data
                received.update(data)
                left -= len(data)
    assert sent.digest() == received.digest()


async def test_a_socket_is_its_owners_and_gone_afterwards(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    path = folder / "s"
    path.touch()  # of somebody dead
    async with standing(address) as line:
        async with carried(line, path, "exec cat"):
            assert await reaches(path)
            assert path.stat().st_mode & 0o777 == 0o600
        assert not path.exists()
    assert [name for name in os.listdir(folder) if name != "home"] == []


async def test_one_client_after_another(sshd: Sshd, client: Client, address: Address, folder: Path) -> None:
    client.may_enter(sshd)
    path = folder / "s"
    async with standing(address) as line, carried(line, path, "exec cat"):
        first = await connected(path)
        await first.send_all(b"1")
        assert await exactly(first, 1) == b"1"
        second = await connected(path)
        await second.send_all(b"2")
        with trio.move_on_after(0.5) as waiting:
            await exactly(second, 1)
        assert waiting.cancelled_caught
        await first.aclose()
        assert await exactly(second, 1) == b"2"
        await second.aclose()


async def test_what_a_command_says_last_arrives_and_then_the_end(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    ended: list[Finished] = []
    command = "head -c 3000000 /dev/zero; echo so it is >&2; exit 3"
    async with standing(address) as line, carried(line, folder / "s", command, ended):
        async with await connected(folder / "s") as stream:
            await trio.sleep(0.5)  # more than the socket holds is waiting
            assert len(await exactly(stream, 3_000_001)) == 3_000_000
        with trio.fail_after(PATIENCE):
            while not ended:
                await trio.sleep(0.02)
    assert ended == [Finished(3, b"", b"so it is\n")]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's socket takes less than one packet: of what it does not read, a rest is always the bridge's."""

    class Narrow(bridge.Bridge):
        def __init__(self, client: socket.socket) -> None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            super().__init__(client)

    monkeypatch.setattr(bridge, "Bridge", Narrow)


async def closed(sshd: Sshd, commands: int) -> None:
    """So many commands have ended, and here that has been heard."""
    with trio.fail_after(PATIENCE):
        while sshd.log().count("Close session") < commands:
            await trio.sleep(0.05)
    await trio.sleep(0.3)


async def test_what_a_command_says_last_waits_for_a_client_that_reads_after_its_end(
    sshd: Sshd, client: Client, address: Address, folder: Path, narrow: None
) -> None:
    """Nor does it matter that the client writes first, what nobody takes any more."""
    client.may_enter(sshd)
    ended: list[Finished] = []
    command = "head -c 20000 /dev/zero; exit 3"
    async with standing(address) as line, carried(line, folder / "s", command, ended):
        for commands, late in (1, b""), (2, bytes(MIB)):
            async with await connected(folder / "s") as stream:
                await closed(sshd, commands)
                await stream.send_all(late)
                assert len(await exactly(stream, 20001)) == 20000
            with trio.fail_after(PATIENCE):
                while len(ended) < commands:
                    await trio.sleep(0.02)
    assert ended == 2 * [Finished(3, b"", b"")]


async def test_a_command_has_ended_by_itself_also_where_its_client_does_not_read_the_rest(
    sshd: Sshd, client: Client, address: Address, folder: Path, narrow: None
) -> None:
    client.may_enter(sshd)
    ended: list[Finished] = []
    command = "head -c 20000 /dev/zero; exit 3"
    async with standing(address) as line, carried(line, folder / "s", command, ended):
        async with await connected(folder / "s"):
            await closed(sshd, 1)
        with trio.fail_after(PATIENCE):
            while not ended:
                await trio.sleep(0.02)
    assert ended == [Finished(3, b"", b"")]


async def test_a_client_that_does_not_read_stops_the_command_and_nobody_else(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    """The command counts what it was rid of: what we hold is bounded."""
    client.may_enter(sshd)
    count = folder / "count"
    counting = (
        f"import os\nn=0\nwhile 1:\n n+=os.write(1,bytes(65536)); open({str(count)!r},'w').write(str(n))"
    )
    async with standing(address) as line:
        async with (
            carried(line, folder / "a", f'exec python3 -c "{counting}"'),
            carried(line, folder / "b", "exec cat"),
        ):
            idle = await connected(folder / "a")
            written = -1
            with trio.fail_after(PATIENCE):
                while not count.exists() or written != (written := int(count.read_text() or 0)):
                    await trio.sleep(1)
            assert 0 < written < 32 * MIB
            assert await reaches(folder / "b")
            # Nobody hears that it has gone, until somebody else comes.
            await idle.aclose()
            async with await connected(folder / "a") as another:
                assert len(await exactly(another, 16 * MIB)) == 16 * MIB


async def test_a_command_that_does_not_read_stops_its_client(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    async with standing(address) as line, carried(line, folder / "s", "exec sleep 1000"):
        async with await connected(folder / "s") as stream:
            sent = 0
            with trio.move_on_after(3):
                while sent < 64 * MIB:
                    await stream.send_all(bytes(65536))
                    sent += 65536
            assert sent < 32 * MIB
        # It has hung up while nobody read from it.
        async with await connected(folder / "s") as another:
            with trio.move_on_after(1):
                await another.send_all(bytes(65536))


async def test_a_command_that_fails_is_not_started_as_fast_as_clients_come(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    ended: list[Finished] = []
    times: list[float] = []
    async with standing(address) as line, carried(line, folder / "s", "echo no >&2; exit 3", ended):
        with trio.fail_after(PATIENCE):
            while len(ended) < 3:
                async with await connected(folder / "s") as stream:
                    with suppress(trio.BrokenResourceError):
                        await exactly(stream, 1)
                times.append(trio.current_time())
                await trio.sleep(0.01)
    assert set(ended) == {Finished(3, b"", b"no\n")}
    assert times[2] - times[0] > 1.4  # pauses of 0.5 and 1 s


async def test_each_plane_has_a_line_of_its_own(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    async with standing(address) as line:
        async with carried(line, folder / "a", "exec cat"), carried(line, folder / "b", "exec cat"):
            assert await reaches(folder / "a")
            assert await reaches(folder / "b")
            assert (await line.run("echo besides")).out == b"besides\n"
            assert sshd.log().count("Accepted publickey") == 2


async def test_who_is_let_in_once_has_one_line_for_all(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    async with standing(address) as line:
        sshd.authorized_keys.write_text("")  # from now on nobody is
        async with carried(line, folder / "a", "exec cat"), carried(line, folder / "b", "exec cat"):
            assert await reaches(folder / "a")
            assert await reaches(folder / "b")


# A line that is lost.


async def until(line: SshLines, state: LinkState) -> None:
    with trio.fail_after(PATIENCE):
        while line.condition.state is not state:
            await trio.sleep(0.02)


async def test_sshd_is_killed_and_comes_back(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    path = folder / "s"
    seen: list[LinkState] = []
    async with standing(address) as line, carried(line, path, "exec cat"):
        line.on_change(lambda condition: seen.append(condition.state))
        stream = await connected(path)
        await stream.send_all(b"x")
        assert await exactly(stream, 1) == b"x"
        sshd.stop()
        with trio.fail_after(PATIENCE):
            assert await stream.receive_some() == b""  # what was carried is closed
        await stream.aclose()
        with trio.fail_after(PATIENCE):
            while line.condition.attempts < 2:
                await trio.sleep(0.02)
        assert not path.exists()
        assert line.condition.state is LinkState.LOST
        assert "refuses connections" in line.condition.reason
        assert not line.condition.final
        with pytest.raises(Unreachable, match="refuses connections"):
            await line.run("true", timeout=1)
        sshd.start()
        assert await reaches(path)
        assert line.condition.state is LinkState.CONNECTED
        assert line.condition.attempts == 0
        assert (await line.run("echo back")).out == b"back\n"
    assert seen[0] is LinkState.LOST
    assert seen[-1] is LinkState.CONNECTED


async def test_a_command_that_runs_while_the_line_is_lost_fails(
    sshd: Sshd, client: Client, address: Address
) -> None:
    client.may_enter(sshd)
    async with standing(address) as line:
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(Unreachable, match="was lost"):
                    await line.run("echo started >&2; exec sleep 1000", timeout=PATIENCE)

            nursery.start_soon(run)
            await trio.sleep(1)
            sshd.end_connections()


async def test_a_line_that_was_cut_for_a_moment_goes_on(sshd: Sshd, client: Client, folder: Path) -> None:
    client.may_enter(sshd)
    with DelayLine(f"{sshd.address}:{sshd.port}", 0.005) as delay:
        client.trust(sshd, delay.port)
        async with standing(Address("127.0.0.1", account(), delay.port)) as line:
            async with carried(line, folder / "s", "exec cat"), await connected(folder / "s") as stream:
                await stream.send_all(b"x")
                assert await exactly(stream, 1) == b"x"
                delay.cut()
                await stream.send_all(b"y")
                await trio.sleep(1)
                delay.restore()
                assert await exactly(stream, 1) == b"y"
            assert line.condition.state is LinkState.CONNECTED


async def test_silence_is_a_loss_at_once_after_this_machine_has_slept(
    sshd: Sshd, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keepalives alone would take a minute; a jump of the clock asks at once."""
    told, jump = trio.open_memory_channel[Callable[[], None]](1)

    async def watch(jumped: Callable[[], None]) -> None:
        told.send_nowait(jumped)
        await trio.sleep_forever()

    monkeypatch.setattr(clock_jumps, "watch", watch)
    monkeypatch.setattr(ssh_line, "PROOF_INTERVAL", 0.2)
    client.may_enter(sshd)
    with DelayLine(f"{sshd.address}:{sshd.port}") as delay:
        client.trust(sshd, delay.port)
        async with standing(Address("127.0.0.1", account(), delay.port)) as line:
            jumped = await jump.receive()
            async with carried(line, folder / "s", "exec cat"):
                assert await reaches(folder / "s")
                jumped()  # it is there: nothing is lost
                await trio.sleep(2)
                assert line.condition.state is LinkState.CONNECTED
                since = line.condition.since
                delay.vanish()
                jumped()
                await until(line, LinkState.LOST)
                delay.refuse()
                delay.restore()
                jumped()
                assert await reaches(folder / "s")
                assert line.condition.since > since


async def test_a_line_is_ended_while_no_packet_of_it_arrives(
    sshd: Sshd, client: Client, folder: Path
) -> None:
    """With much under way both ways, which nobody is going to take."""
    client.may_enter(sshd)
    with DelayLine(f"{sshd.address}:{sshd.port}") as delay:
        client.trust(sshd, delay.port)
        with trio.fail_after(PATIENCE):
            async with standing(Address("127.0.0.1", account(), delay.port)) as line:
                async with carried(line, folder / "s", "exec cat"), await connected(folder / "s") as stream:
                    with trio.move_on_after(1):
                        while True:
                            await stream.send_all(bytes(MIB))
                    delay.vanish()
        assert not (folder / "s").exists()


async def test_a_machine_that_has_another_key_after_a_loss_is_not_tried_again(
    sshd: Sshd, client: Client, address: Address, folder: Path
) -> None:
    client.may_enter(sshd)
    async with standing(address) as line, carried(line, folder / "s", "exec cat"):
        sshd.stop()
        sshd.change_host_key()
        sshd.start()
        with trio.fail_after(PATIENCE):
            while not line.condition.final:
                await trio.sleep(0.02)
        assert "shows another key" in line.condition.reason
        assert line.condition.hint
        with pytest.raises(Refused, match="shows another key"):
            await line.run("true")
