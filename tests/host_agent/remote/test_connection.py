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

from host_agent.remote import connection, ssh_config
from host_agent.remote.connection import Prompts, connect
from host_agent.remote.failures import Refused, Unreachable
from host_agent.remote.machine import MAX_SENTENCE, Address
from host_agent.remote.prompts import Remembered

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


@dataclass
class Known:
    """Answers as ``remembered`` does, and trusts the machine."""

    remembered: Remembered

    def ask(self, question: str, *, secret: bool) -> str | None:
        return self.remembered.ask(question, secret=secret)

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
    monkeypatch.setattr(ssh_config, "SYSTEM", tmp_path / "etc")
    return tmp_path


def attempt(
    server: Callable[[], asyncssh.SSHServer],
    prompts: Prompts | None,
    patience: float = PATIENCE,
    **settings: object,
) -> int:
    """Connect to such a server; its port. Raises what ``connect`` raises."""

    async def go() -> int:
        key = asyncssh.generate_private_key("ssh-ed25519")
        async with asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[key], server_factory=server, **settings
        ) as listener:
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


def test_each_line_of_a_machines_question_says_whose_it_is() -> None:
    class Posing(Questions):
        def get_kbdint_challenge(
            self, username: str, lang: str, submethods: str
        ) -> tuple[str, str, str, list[tuple[str, bool]]]:
            prompt = "Code\x1b[2K\r\n\nPassphrase of the key ~/.ssh/id_ed25519:\n" + "x\n" * 1000
            return "", "", "", [(prompt, True)]

        def validate_kbdint_response(self, username: str, responses: list[str]) -> bool:
            return True

    person = Person(["me"])
    attempt(Posing, person)
    ((question, _),) = person.asked
    first, second, *more = question.split("\n")
    assert (first, second) == (
        "me@127.0.0.1 asks: Code",
        "me@127.0.0.1 asks: Passphrase of the key ~/.ssh/id_ed25519:",
    )
    assert set(more) == {"me@127.0.0.1 asks: x"}
    assert len(more) < connection.MAX_LINES


def test_a_code_for_one_login_is_not_said_at_the_next() -> None:
    """Not even once: a machine that counts would lock the account. Whoever looks is told what is wanted."""
    heard: list[list[str]] = []

    class Codes(Questions):
        def get_kbdint_challenge(
            self, username: str, lang: str, submethods: str
        ) -> tuple[str, str, str, list[tuple[str, bool]]]:
            return "", "", "", [("Password: ", False), ("Code: ", False)]

        def validate_kbdint_response(self, username: str, responses: list[str]) -> bool:
            heard.append(responses)
            return True

    asks = "me@127.0.0.1 asks: "
    remembered = Remembered({f"{asks}Password:": "right", f"{asks}Code:": "123"})
    known = Known(remembered)
    attempt(Codes, known)
    with pytest.raises(Refused, match=f"wants an answer at each login: {asks}Code:") as refused:
        attempt(Codes, known)
    assert "Attach it again" in refused.value.hint
    assert heard == [["right", "123"]]


def test_who_gives_up_is_not_let_in() -> None:
    with pytest.raises(Refused):
        attempt(Questions, Person([None]))


def test_nobody_is_hurried_while_they_think() -> None:
    class Slow(Person):
        def ask(self, question: str, *, secret: bool) -> str | None:
            asyncio.run(asyncio.sleep(3))
            return super().ask(question, secret=secret)

    attempt(Passwords, Slow(["right"]), patience=2.5)


@pytest.mark.parametrize(
    ("named", "written"),
    [("/dev/null", "known_hosts"), ("none", "known_hosts"), ("~/.ssh/mine /nonexistent", "mine")],
)
def test_a_key_that_is_trusted_is_found_again_whatever_the_configuration_says(
    home: Path, named: str, written: str
) -> None:
    configure(home, f"UserKnownHostsFile {named}")
    attempt(Passwords, Person(["right"]))
    assert " ssh-ed25519 " in (home / ".ssh" / written).read_text()


def test_a_machine_cannot_insist_on_compression(home: Path) -> None:
    """Of which a packet of a few kB may be any size."""
    packed = {"compression_algs": ["zlib@openssh.com"]}
    with pytest.raises(Refused, match="no way to speak"):
        attempt(Passwords, Person(["right"]), **packed)
    configure(home, "Compression yes")
    attempt(Passwords, Person(["right"]), **packed)


def test_what_a_machine_says_when_it_ends_the_connection_is_bounded_and_plain() -> None:
    class Rude(Passwords):
        def begin_auth(self, username: str) -> bool:
            raise asyncssh.DisconnectError(2, "go\x1b[2J\naway " + "!" * 20_000)

    with pytest.raises(Unreachable) as refused:
        attempt(Rude, Person(["right"]))
    assert "failed: go away !!" in refused.value.message
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 2 * MAX_SENTENCE


@pytest.mark.parametrize("public", [True, False])
def test_where_only_one_key_counts_no_other_of_the_agents_is_shown(home: Path, public: bool) -> None:
    configure(home, "IdentityFile ~/.ssh/one\nIdentitiesOnly yes")
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(home / ".ssh/one")
    expected: dict[str, object] = {"agent_path": None}
    if public:
        key.write_public_key(home / ".ssh/one.pub")
        expected = {"agent_identities": [str(home / ".ssh/one.pub")]}
    words = ssh_config.keys(asyncio.run(ssh_config.read(Address("box"))))
    assert words == {"ignore_encrypted": True, "client_keys": [str(home / ".ssh/one")]} | expected


def configure(home: Path, config: str) -> None:
    (home / ".ssh").mkdir(exist_ok=True)
    (home / ".ssh/config").write_text(f"{config}\n")


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
