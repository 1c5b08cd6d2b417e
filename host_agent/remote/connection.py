"""One SSH connection to a machine, made as ``ssh`` would make it: the asyncio side, of which trio knows nothing.

The law: what ssh would refuse, this refuses. Host keys are checked strictly, for each machine on the way (ProxyJump);
~/.ssh/config, the agent and the keys are the user's; and somebody is only asked where ``Prompts`` were given. Every
failure is a ``UserError`` (``failures``).

asyncssh opens a ProxyJump with options of its own; that is done here, from the configuration that it has read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import asyncssh

from host_agent.errors import UserError
from host_agent.remote import known_hosts, ssh_config
from host_agent.remote.answers import is_for_one_login
from host_agent.remote.failures import Refused, Unreachable, explained, try_it, unanswered
from host_agent.remote.machine import Address, shown

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Seconds for a connection to stand, without what somebody takes to answer.
PATIENCE: Final = 20.0

#: Seconds for what was connected to be closed, which needs nobody else.
END_PATIENCE: Final = 5.0

#: Seconds of silence before the machine is asked whether it is there, and how often, as ServerAliveInterval says.
KEEPALIVE_INTERVAL: Final = 15
KEEPALIVE_COUNT: Final = 3

#: How often somebody is asked for the same secret, as ssh does.
ATTEMPTS: Final = 3

#: Lines of a question of the machine's that are shown.
MAX_LINES: Final = 20

#: Machines on the way to one: a configuration whose jumps lead in a circle has more.
MAX_JUMPS: Final = 8

#: The fastest first: AES is in the processor. Over loopback, with asyncssh, aes128-gcm carried 109 MB/s, aes256-gcm and
#: aes128-ctr 96, chacha20 79, and a packet took 0.23, 0.24, 0.25 and 0.32 ms there and back. A ``Ciphers`` line of the
#: user's wins.
CIPHERS: Final = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes256-ctr",
    "aes192-ctr",
    "aes128-ctr",
)

# It tells of each connection, each command and each window; what matters is raised.
asyncssh.set_log_level(logging.WARNING)


class Prompts(Protocol):
    """Somebody who can be asked. Both are called in a thread of their own and may take their time."""

    def ask(self, question: str, *, secret: bool) -> str | None:
        """An answer, not to be shown while it is typed if ``secret``; None if there is none.

        The same question is always in the same words.
        """

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        """Whether ``host`` is the machine with that key. A yes is written into ~/.ssh/known_hosts."""


async def connect(
    target: Address,
    prompts: Prompts | None = None,
    *,
    lost: Callable[[Exception | None], None] = lambda _: None,
    patience: float = PATIENCE,
) -> asyncssh.SSHClientConnection:
    """A connection that stands; ``lost`` is called when it ends. Raises ``Refused`` or ``Unreachable``."""
    try:
        async with asyncio.timeout(patience) as limit:
            return await _Dial(prompts, limit, patience, lost).dial(target, 0)
    except TimeoutError:
        raise Unreachable(f"{target} has not answered within {patience:.0f} s.", try_it(target)) from None


async def end(connection: asyncssh.SSHClientConnection) -> None:
    """Nothing is under way on it any more, nor on those that it goes through."""
    connection.abort()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_PATIENCE):
            await connection.wait_closed()


class _Dial:
    """The connections on the way to one machine."""

    def __init__(
        self,
        prompts: Prompts | None,
        limit: asyncio.Timeout,
        patience: float,
        lost: Callable[[Exception | None], None],
    ) -> None:
        self._prompts = prompts
        self._limit = limit
        self._patience = patience
        self._lost = lost

    async def dial(
        self, target: Address, depth: int, tunnel: asyncssh.SSHClientConnection | None = None
    ) -> asyncssh.SSHClientConnection:
        if depth > MAX_JUMPS:
            raise Refused(f"The ProxyJump lines of ~/.ssh/config lead to {target.host} in a circle.")
        given = await ssh_config.read(target)
        if tunnel is None:
            tunnel = await self._jump(given, depth)
        try:
            connection = await self._connect(target, given, tunnel, last=depth == 0)
        except BaseException:
            if tunnel is not None:
                await end(tunnel)
            raise
        if tunnel is not None:
            connection.set_tunnel(tunnel)  # ends with it
        return connection

    async def _jump(
        self, given: asyncssh.SSHClientConnectionOptions, depth: int
    ) -> asyncssh.SSHClientConnection | None:
        jumps = str(given.tunnel or "none")
        if jumps.lower() == "none":
            return None
        connection = None
        for text in jumps.split(","):
            try:
                jump = Address.parse(text.strip())
            except UserError as error:
                raise Refused(f"The ProxyJump of {given.host} cannot be used: {error.message}.") from None
            connection = await self.dial(jump, depth + 1, connection)
        return connection

    async def _connect(
        self,
        target: Address,
        given: asyncssh.SSHClientConnectionOptions,
        tunnel: asyncssh.SSHClientConnection | None,
        last: bool,
    ) -> asyncssh.SSHClientConnection:
        """Raises ``Refused``, ``Unreachable`` or ``TimeoutError``."""
        files = ssh_config.known_hosts_files(given)
        while True:
            known = await asyncio.to_thread(
                known_hosts.look_up, files, given.host, given.port, given.host_key_alias
            )
            client = _Client(self, f"{given.username}@{given.host}", self._lost if last else lambda _: None)
            try:
                return await asyncssh.connect(**self._words(target, given, known, client, tunnel))
            except asyncssh.HostKeyNotVerifiable as error:
                await self._settle(target, given, known, client, files[0], str(error))
            except Exception as error:  # what a server sends may come out of asyncssh as anything
                if isinstance(error, asyncssh.PermissionDenied) and client.unanswered:
                    raise unanswered(client.unanswered, target, given) from None
                raise explained(error, target, given) from error

    def _words(
        self,
        target: Address,
        given: asyncssh.SSHClientConnectionOptions,
        known: known_hosts.Known,
        client: _Client,
        tunnel: asyncssh.SSHClientConnection | None,
    ) -> dict[str, Any]:
        """The arguments of ``asyncssh.connect``."""
        config = given.config
        words: dict[str, Any] = {
            "host": target.host,
            "port": given.port,
            "username": given.username,
            "options": given,
            "config": None,
            "client_factory": lambda: client,
            "known_hosts": lambda host, address, port: (known.keys, known.authorities, known.revoked),
            "connect_timeout": None,
            "login_timeout": 0,
            "keepalive_interval": config.get("ServerAliveInterval") or KEEPALIVE_INTERVAL,
            "keepalive_count_max": config.get("ServerAliveCountMax") or KEEPALIVE_COUNT,
            "agent_forwarding": False,
            "x11_forwarding": False,
            "tunnel": tunnel,
            **ssh_config.keys(given),
        }
        if self._prompts is not None:
            words["passphrase"] = self.passphrase
        if tunnel is not None or ssh_config.is_none(given.proxy_command):
            words["proxy_command"] = None
        if config.get("HostKeyAlgorithms") is None:
            words["server_host_key_algs"] = list(known.algorithms)
        if not config.get("Compression"):
            words["compression_algs"] = [
                "none"
            ]  # or a machine could insist on it, and have a packet take any size
        if config.get("Ciphers") is None:
            words["encryption_algs"] = [*CIPHERS]
        return words

    async def _settle(
        self,
        target: Address,
        given: asyncssh.SSHClientConnectionOptions,
        known: known_hosts.Known,
        client: _Client,
        file: Path,
        problem: str,
    ) -> None:
        """A key that is not known: returns once it is, in ``file``. Raises ``Refused``."""
        key = client.offered
        name = known_hosts.listed_as(given.host, given.port, given.host_key_alias)
        if key is None:
            raise Refused(
                f"{name} could not show that it is the machine it says: {shown(problem)}.", try_it(target)
            )
        kind, fingerprint = key.get_algorithm(), key.get_fingerprint()
        if known.same_name:
            raise Refused(
                f"{name} shows another key than the one known for it: {kind} {fingerprint}. Is somebody in between?",
                f"If the machine was installed anew, forget its old key with: ssh-keygen -R {shlex.quote(name)}",
            )
        if self._prompts is None or not await self.asked(self._prompts.trust, name, kind, fingerprint):
            raise Refused(
                f"{name} is not known here; its key is {kind} {fingerprint}.",
                "Compare that with what its owner says, and make it known by connecting once. "
                + try_it(target),
            )
        try:
            await asyncio.to_thread(known_hosts.remember, file, name, key)
        except OSError as error:
            raise Refused(f"{file} cannot be written: {error.strerror}.") from error

    async def passphrase(self, file: str) -> str:
        """For a key that asyncssh wants to use. Raises ``Refused``."""
        assert self._prompts is not None
        answer = None
        for _ in range(ATTEMPTS):
            before, answer = (
                answer,
                await self.ask(f"Passphrase of the key {ssh_config.short(file)}", secret=True),
            )
            if answer is None or answer == before:
                break
            try:
                await asyncio.to_thread(asyncssh.read_private_key, file, answer)
            except (asyncssh.KeyEncryptionError, asyncssh.KeyImportError):
                continue
            return answer
        raise Refused(
            f"The key {ssh_config.short(file)} was not opened: its passphrase is missing or wrong.",
            f"Give the key to your ssh-agent: ssh-add {shlex.quote(ssh_config.short(file))}",
        )

    @property
    def asks(self) -> bool:
        return self._prompts is not None

    async def ask(self, question: str, *, secret: bool) -> str | None:
        if self._prompts is None:
            return None
        prompts = self._prompts
        return await self.asked(lambda: prompts.ask(question, secret=secret))

    async def asked(self, ask: Callable[P, T], *words: P.args, **more: P.kwargs) -> T:
        """Nobody is hurried: time stands still meanwhile."""
        self._limit.reschedule(None)
        try:
            return await asyncio.to_thread(ask, *words, **more)
        finally:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._patience)


class _Client(asyncssh.SSHClient):
    """What asyncssh asks while a connection is made, and whom it tells of its end."""

    def __init__(self, dial: _Dial, account: str, lost: Callable[[Exception | None], None]) -> None:
        self.offered: asyncssh.SSHKey | None = None
        self.unanswered = ""
        """What it asks for at each login, and had no answer to."""
        self._dial = dial
        self._account = account
        self._lost = lost
        self._answers: list[str] = []

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(exc)

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.offered = key
        return False

    async def password_auth_requested(self) -> str | None:
        return await self._fresh(f"Password of {self._account}")

    def kbdint_auth_requested(self) -> str | None:
        return "" if self._dial.asks and len(self._answers) < ATTEMPTS else None

    async def kbdint_challenge_received(
        self, name: str, instructions: str, lang: str, prompts: Sequence[tuple[str, bool]]
    ) -> list[str] | None:
        answers = []
        for prompt, shown_while_typed in prompts:
            question = self._asks(prompt)
            answer = await self._fresh(question, secret=not shown_while_typed)
            if answer is None:
                self.unanswered = question if is_for_one_login(question) else ""
                return None
            answers.append(answer)
        return answers

    def _asks(self, prompt: str) -> str:
        """A question of the machine's. Each line of it says whose it is: it might look like one of ours."""
        lines = [line for text in prompt.splitlines()[:MAX_LINES] if (line := shown(text))]
        return "\n".join(f"{self._account} asks: {line}" for line in lines or [""])

    async def _fresh(self, question: str, *, secret: bool = True) -> str | None:
        """None once it was asked too often, or the answer is one that was refused already."""
        if len(self._answers) >= ATTEMPTS:
            return None
        answer = await self._dial.ask(question, secret=secret)
        if answer is None or answer in self._answers:
            return None
        self._answers.append(answer)
        return answer
