"""Which words of a copy are of an instance: what can mean two things is refused."""

from __future__ import annotations

import pytest

from host_agent.copy_words import Plan, understand
from host_agent.errors import ExitCode, UserError

INSTANCES = ("box", "default", "dev")


def plan(
    *words: str,
    chosen: str = "default",
    insists: bool = False,
    files: tuple[str, ...] = ("a", "b"),
    guest: bool = False,
) -> Plan:
    instances = (*INSTANCES, "guest") if guest else INSTANCES
    return understand(
        words[:-1], words[-1], chosen=chosen, insists=insists, instances=instances, exists=files.__contains__
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "guest:"], Plan("default", "guest:", True, ("a",), "")),
        (["guest:/etc/hosts", "."], Plan("default", "guest:", False, ("/etc/hosts",), ".")),
        (["guest:", "b"], Plan("default", "guest:", False, (".",), "b")),
        (["dev:/etc/hosts", "."], Plan("dev", "dev:", False, ("/etc/hosts",), ".")),
        (["a", "b", "dev:there"], Plan("dev", "dev:", True, ("a", "b"), "there")),
        (["default:a:b", "."], Plan("default", "default:", False, ("a:b",), ".")),
        (["dev:a", "dev:b", "/tmp"], Plan("dev", "dev:", False, ("a", "b"), "/tmp")),
        # With a slash before the colon it is of this machine; and so is what no instance is called.
        (["./dev:a", "guest:"], Plan("default", "guest:", True, ("./dev:a",), "")),
        (["nobody:a", "guest:"], Plan("default", "guest:", True, ("nobody:a",), "")),
        (["Dev:a", "dev:"], Plan("dev", "dev:", True, ("Dev:a",), "")),
    ],
)
def test_who_is_meant(words: list[str], expected: Plan) -> None:
    assert plan(*words) == expected


def test_a_chosen_instance_is_guest_and_may_be_named_too() -> None:
    assert plan("a", "guest:", chosen="box", insists=True).instance == "box"
    assert plan("a", "box:x", chosen="box", insists=True).instance == "box"
    assert plan("guest:a", "box:b", ".", chosen="box").instance == "box"
    # What is in the environment is less than what is typed.
    assert plan("a", "box:", chosen="dev").instance == "box"


@pytest.mark.parametrize(
    ("words", "options", "message", "hint"),
    [
        (["a", "b"], {}, "all of SRC are to be on one side, and DST on the other", "./guest:..."),
        (["guest:a", "dev:b"], {}, "all of SRC are to be on one side", "box:/etc/hosts"),
        (["a", "dev:b", "dev:c"], {}, "all of SRC are to be on one side", ""),
        (["dev:a", "box:b", "."], {}, "box and dev are two instances", "one after the other"),
        (["guest:a", "dev:b", "."], {}, "default and dev are two instances", ""),
        (
            ["dev:a", "."],
            {"files": ("dev:a",)},
            "dev:a is a file here, and a path of instance dev",
            "write ./dev:a",
        ),
        (
            ["a", "dev:"],
            {"chosen": "box", "insists": True},
            "dev: is one instance, and --instance says box",
            "",
        ),
        (
            ["a", "guest:"],
            {"guest": True},
            "guest: is of the instance that is called guest, or of default",
            "--instance guest",
        ),
        (
            ["a", "dve:/tmp"],
            {},
            "there is no instance dve, and no file dve:/tmp",
            "there is box, default, dev",
        ),
    ],
)
def test_what_can_mean_two_things_is_refused(
    words: list[str], options: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(UserError) as refused:
        plan(*words, **options)  # type: ignore[arg-type]
    assert refused.value.message.startswith(message)
    assert hint in refused.value.hint
    assert refused.value.exit_code == ExitCode.USAGE


def test_an_instance_that_is_called_guest_can_be_meant() -> None:
    assert plan("a", "guest:x", chosen="guest", guest=True).instance == "guest"
