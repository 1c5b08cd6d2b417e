"""What is asked while a connection is made, against a server of asyncssh's own: no sshd is needed."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh
import pytest

from host_agent.remote import connection
from host_agent.remote.connection import Prompts, Refused, Unreachable, connect
from host_agent.remote.machine import Address

PATIENCE = 60.0


@dataclass
class Person:
    """Gives these answers, one after another, to whatever is asked."""

    answers: list[str | None]
    asked: list[tuple[str, bool]] = field(default_factory=list)

    def ask(self, question: str, *, secret: bool) -> str | None:
        self.asked.append((question, secret))
        return self.answers.pop(0) if self.answers else None

    def trust(self, host: str, key_type: str, fingerprint: str) -> bool:
        return True


class Passwords(asyncssh.SSHServer):
    """Lets in who says "right"."""

    attempts = 0

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def kbdint_auth_supported(self) -> bool:
        return False  # else asyncssh asks for the password that way

    def validate_password(self, username: str, password: str) -> bool:
        type(self).attempts += 1
        return password == "right"


class Questions(asyncssh.SSHServer):
    """Asks two things."""

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return False

    def kbdint_auth_supported(self) -> bool:
        return True

    def get_kbdint_challenge(
        self, username: str, lang: str, submethods: str
    ) -> tuple[str, str, str, list[tuple[str, bool]]]:
        return "", "", "", [("Your name: ", True), ("Code: ", False)]

    def validate_kbdint_response(self, username: str, responses: list[str]) -> bool:
        return responses == ["me", "123"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(connection, "SYSTEM", tmp_path / "etc")
    return tmp_path


def attempt(
    server: Callable[[], asyncssh.SSHServer], prompts: Prompts | None, patience: float = PATIENCE
) -> int:
    """Connect to such a server; its port. Raises what ``connect`` raises."""

    async def go() -> int:
        key = asyncssh.generate_private_key("ssh-ed25519")
        async with asyncssh.listen("127.0.0.1", 0, server_host_keys=[key], server_factory=server) as listener:
            port = listener.get_port()
            made = await connect(Address("127.0.0.1", "me", port), prompts, patience=patience)
            await connection.end(made)
            return port

    return asyncio.run(go())


def test_a_password_is_asked_for_until_it_is_right() -> None:
    person = Person(["wrong", "right"])
    attempt(Passwords, person)
    assert person.asked == [("Password of me@127.0.0.1", True)] * 2


def test_the_same_wrong_password_is_not_said_twice() -> None:
    """The host agent answers from memory, and a machine that counts would lock the account."""
    Passwords.attempts = 0
    with pytest.raises(Refused, match="lets me in with none of the keys"):
        attempt(Passwords, Person(["wrong"] * 9))
    assert Passwords.attempts == 1


def test_three_passwords_are_enough() -> None:
    person = Person(["a", "b", "c", "right"])
    with pytest.raises(Refused):
        attempt(Passwords, person)
    assert len(person.asked) == 3


def test_nobody_is_asked_where_nobody_is() -> None:
    with pytest.raises(Refused, match="is not known here"):
        attempt(Passwords, None)


def test_the_machines_own_questions() -> None:
    person = Person(["me", "123"])
    attempt(Questions, person)
    assert person.asked == [("me@127.0.0.1 asks: Your name:", False), ("me@127.0.0.1 asks: Code:", True)]


def test_who_gives_up_is_not_let_in() -> None:
    with pytest.raises(Refused):
        attempt(Questions, Person([None]))


def test_nobody_is_hurried_while_they_think() -> None:
    class Slow(Person):
        def ask(self, question: str, *, secret: bool) -> str | None:
            asyncio.run(asyncio.sleep(3))
            return super().ask(question, secret=secret)

    attempt(Passwords, Slow(["right"]), patience=2.5)


@contextmanager
def who_says(said: bytes) -> Iterator[int]:
    """The port of somebody who says that to one who connects, and waits for them to leave."""

    def answer() -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):
            peer.sendall(said)
            while peer.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0" * 100_000,
        b"SSH-2.0-x\r\n" + b"\xff" * 4096,
        b"SSH-1.5-old\r\n",
    ],
)
def test_a_server_that_is_none_is_an_error_and_no_more(said: bytes) -> None:
    with who_says(said) as port, pytest.raises((Refused, Unreachable)):
        asyncio.run(connect(Address("127.0.0.1", "me", port), patience=3))


def test_a_name_without_an_address() -> None:
    with pytest.raises(Unreachable, match="There is no address for no-such-machine.invalid"):
        asyncio.run(connect(Address("no-such-machine.invalid")))
