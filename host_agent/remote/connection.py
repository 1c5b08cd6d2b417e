"""One SSH connection to a machine, made as ``ssh`` would make it: the asyncio side, of which trio knows nothing.

The law: what ssh would refuse, this refuses. Host keys are checked strictly, for each machine on the way (ProxyJump);
~/.ssh/config, the agent and the keys are the user's; and somebody is only asked where ``Prompts`` were given. Every
failure is a ``UserError``: ``Refused`` does not get better by trying again, ``Unreachable`` may.

asyncssh opens a ProxyJump with options of its own, fails over an IdentityFile that is missing and over "none", and
does not know the system's files: all of that is done here, from the configuration that it has read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import asyncssh

from host_agent.errors import ExitCode, UserError
from host_agent.remote import known_hosts
from host_agent.remote.machine import Address

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

#: In ~/.ssh, as ssh tries them.
USUAL_KEYS: Final = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")

SYSTEM: Final = Path("/etc/ssh")

# It tells of each connection, each command and each window; what matters is raised.
asyncssh.set_log_level(logging.WARNING)


class Refused(UserError):
    """Does not get better by trying again."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.GUEST)


class Unreachable(UserError):
    """May get better by itself."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.GUEST)


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
        raise Unreachable(f"{target} has not answered within {patience:.0f} s.", _try(target)) from None


async def end(connection: asyncssh.SSHClientConnection) -> None:
    """Nothing is under way on it any more, nor on those that it goes through."""
    connection.abort()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_PATIENCE):
            await connection.wait_closed()


def _try(target: Address) -> str:
    """A hint: what shows the same failure with more words."""
    words = ["ssh", *(["-p", str(target.port)] if target.port else [])]
    return f"Try it with: {shlex.join([*words, (f'{target.user}@' if target.user else '') + target.host])}"


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
        given = await self._given(target)
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

    async def _given(self, target: Address) -> asyncssh.SSHClientConnectionOptions:
        """What the configuration says of a machine. No key is loaded yet."""
        files = [file for file in (Path.home() / ".ssh/config", SYSTEM / "ssh_config") if _readable(file)]
        try:
            try:
                return await self._read(target, files)
            except asyncssh.ConfigParseError as error:
                # The system's file is written for ssh alone, and not the user's to mend.
                if not files or files[-1].parent != SYSTEM:
                    raise
                logger.info("%s is left out: %s", files[-1], error)
                return await self._read(target, files[:-1])
        except (asyncssh.ConfigParseError, ValueError, OSError) as error:
            raise Refused(f"~/.ssh/config cannot be used: {error}.", _try(target)) from None

    async def _read(self, target: Address, files: list[Path]) -> asyncssh.SSHClientConnectionOptions:
        words: dict[str, Any] = {"host": target.host, "config": files, "client_keys": None}
        if target.user is not None:
            words["username"] = target.user
        if target.port is not None:
            words["port"] = target.port
        # A `Match exec` runs a program, and files may be on a network.
        return await asyncio.to_thread(lambda: asyncssh.SSHClientConnectionOptions(**words))

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
        while True:
            known = await asyncio.to_thread(
                known_hosts.look_up, _known_hosts_files(given), given.host, given.port, given.host_key_alias
            )
            client = _Client(self, f"{given.username}@{given.host}", self._lost if last else lambda _: None)
            try:
                return await asyncssh.connect(**self._words(target, given, known, client, tunnel))
            except asyncssh.HostKeyNotVerifiable as error:
                await self._settle(target, given, known, client, str(error))
            except Exception as error:  # what a server sends may come out of asyncssh as anything
                raise _explained(error, target, given) from error

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
            **_keys(given),
        }
        if self._prompts is not None:
            words["passphrase"] = self.passphrase
        if tunnel is not None or _is_none(given.proxy_command):
            words["proxy_command"] = None
        if config.get("HostKeyAlgorithms") is None:
            words["server_host_key_algs"] = list(known.algorithms)
        if config.get("Ciphers") is None:
            words["encryption_algs"] = [*CIPHERS]
        return words

    async def _settle(
        self,
        target: Address,
        given: asyncssh.SSHClientConnectionOptions,
        known: known_hosts.Known,
        client: _Client,
        problem: str,
    ) -> None:
        """A key that is not known: returns once it is. Raises ``Refused``."""
        key = client.offered
        name = known_hosts.listed_as(given.host, given.port, given.host_key_alias)
        if key is None:
            raise Refused(f"{name} could not show that it is the machine it says: {problem}.", _try(target))
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
                + _try(target),
            )
        file = Path.home() / ".ssh/known_hosts"
        try:
            await asyncio.to_thread(known_hosts.remember, file, name, key)
        except OSError as error:
            raise Refused(f"{file} cannot be written: {error.strerror}.") from error

    async def passphrase(self, file: str) -> str:
        """For a key that asyncssh wants to use. Raises ``Refused``."""
        assert self._prompts is not None
        answer = None
        for _ in range(ATTEMPTS):
            before, answer = answer, await self.ask(f"Passphrase of the key {_short(file)}", secret=True)
            if answer is None or answer == before:
                break
            try:
                await asyncio.to_thread(asyncssh.read_private_key, file, answer)
            except (asyncssh.KeyEncryptionError, asyncssh.KeyImportError):
                continue
            return answer
        raise Refused(
            f"The key {_short(file)} was not opened: its passphrase is missing or wrong.",
            f"Give the key to your ssh-agent: ssh-add {shlex.quote(_short(file))}",
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
            return await _in_a_thread(lambda: ask(*words, **more))
        finally:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._patience)


class _Client(asyncssh.SSHClient):
    """What asyncssh asks while a connection is made, and whom it tells of its end."""

    def __init__(self, dial: _Dial, account: str, lost: Callable[[Exception | None], None]) -> None:
        self.offered: asyncssh.SSHKey | None = None
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
            answer = await self._fresh(
                f"{self._account} asks: {prompt.strip()}", secret=not shown_while_typed
            )
            if answer is None:
                return None
            answers.append(answer)
        return answers

    async def _fresh(self, question: str, *, secret: bool = True) -> str | None:
        """None once it was asked too often, or the answer is one that was refused already."""
        if len(self._answers) >= ATTEMPTS:
            return None
        answer = await self._dial.ask(question, secret=secret)
        if answer is None or answer in self._answers:
            return None
        self._answers.append(answer)
        return answer


def _explained(
    error: Exception, target: Address, given: asyncssh.SSHClientConnectionOptions
) -> Refused | Unreachable:
    """Why there is no connection, in a sentence."""
    where = f"{given.host}:{given.port}"
    if isinstance(error, Refused | Unreachable):
        return error
    if isinstance(error, asyncssh.PermissionDenied):
        return Refused(
            f"{where} lets {given.username} in with none of the keys there are.",
            f"It must be possible to log in with a key, from your ssh-agent or ~/.ssh. {_try(target)}",
        )
    if isinstance(error, asyncssh.DisconnectError) and "authentication failures" in error.reason:
        return Refused(
            f"{where} had seen enough keys before one that lets {given.username} in.",
            f"Name the right one in ~/.ssh/config, with IdentityFile and IdentitiesOnly yes. {_try(target)}",
        )
    if isinstance(error, asyncssh.KeyExchangeFailed | asyncssh.ProtocolNotSupported):
        return Refused(f"{where} and this machine have no way to speak to each other: {error}.", _try(target))
    if isinstance(error, socket.gaierror):
        return Unreachable(f"There is no address for {given.host}: {error.strerror}.", _try(target))
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(f"{where} refuses connections: is sshd running there?", _try(target))
    if isinstance(error, asyncssh.Error):
        return Unreachable(f"The connection to {where} failed: {error.reason or error}.", _try(target))
    if isinstance(error, OSError):
        return Unreachable(f"{where} cannot be reached: {error.strerror or error}.", _try(target))
    if isinstance(error, ValueError):  # a key, or a word of the configuration
        return Refused(f"{where} cannot be connected to: {error}.", _try(target))
    return Unreachable(f"The connection to {where} failed: {error!r}.", _try(target))


async def _in_a_thread(ask: Callable[[], T]) -> T:
    """As ``asyncio.to_thread``, for what may never return: nobody waits for that thread."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[Any], None], result: object) -> None:
        if not answer.done():
            settle(result)

    def run() -> None:
        try:
            words: tuple[Callable[[Any], None], object] = (answer.set_result, ask())
        except BaseException as error:
            words = (answer.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, *words)

    threading.Thread(target=run, name="prompt", daemon=True).start()
    return await answer


def _known_hosts_files(given: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    """The user's and the system's, or those that the configuration names."""
    user = given.config.get("UserKnownHostsFile")
    system = given.config.get("GlobalKnownHostsFile")
    return [
        *(
            [Path.home() / ".ssh/known_hosts", Path.home() / ".ssh/known_hosts2"]
            if user is None
            else _paths(user)
        ),
        *([SYSTEM / "ssh_known_hosts", SYSTEM / "ssh_known_hosts2"] if system is None else _paths(system)),
    ]


def _keys(given: asyncssh.SSHClientConnectionOptions) -> dict[str, Any]:
    """Which keys there are: those that the configuration names, or the usual ones.

    ssh passes over what is not there, and what is only a public key is the agent's to use. (Without a list asyncssh
    takes the usual ones, too, and cannot ask for their passphrases.)
    """
    config = given.config
    named = _paths(config.get("IdentityFile", ()))
    usual = [Path.home() / ".ssh" / name for name in USUAL_KEYS]
    private = [str(path) for path in named or usual if _has_private_key(path)]
    words: dict[str, Any] = {"ignore_encrypted": True, "client_keys": private}
    if config.get("IdentitiesOnly") and named:
        public = [path if path.suffix == ".pub" else path.with_name(path.name + ".pub") for path in named]
        words["agent_identities"] = [str(path) for path in public if _readable(path)]
    agent = config.get("IdentityAgent")
    if agent is not None and _is_none(agent):
        words["agent_path"] = None
    return words


def _paths(value: object) -> list[Path]:
    """Of an option that may name several files, or none."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    return [Path(name).expanduser() for name in names if not _is_none(name)]


def _is_none(value: object) -> bool:
    """How an option is switched off; a command is a list of words."""
    words = value if isinstance(value, list | tuple) else [value]
    return len(words) == 1 and str(words[0]).lower() == "none"


def _has_private_key(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"PRIVATE KEY" in file.read(4096)
    except OSError:
        return False


def _readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def _short(file: str) -> str:
    """With ~ for the home folder."""
    path = Path(file)
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else file
