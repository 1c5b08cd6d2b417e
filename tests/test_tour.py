from __future__ import annotations

from pathlib import Path

import pytest

from tests.tour import Step, shape, steps

README = Path(__file__).parents[1] / "README.md"


def test_a_block_is_commands_and_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(
        "```\nagentctl elsewhere\n```\n\n```console\n$ one    # why\nsays this\nand that\n\n$ two 'a # b'; echo $?\n3\n```\n"
    )
    assert steps(path) == [Step("one", ("says this", "and that")), Step("two 'a # b'; echo $?", ("3",))]


def test_two_tours_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("```console\n$ one\n```\n```console\n$ two\n```\n")
    with pytest.raises(ValueError, match="unpack"):
        steps(path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("  up for        39 s", "  up for        4 s"),
        ("  up for        39 s", "  up for        1 min 4 s"),
        ("  disk          60 GiB, 16.4 MiB used", "  disk          20 GiB, 1 GiB used"),
        ("a253e450da0f   26 seconds ago", "0123456789ab   Less than a second ago"),
        ("mounted /home/dev", "mounted /root"),
        (
            "unix:///home/dev/.agentctl/instances/default/docker.sock",
            "unix:///x/y/instances/default/docker.sock",
        ),
        ("INSTANCE/docker.sock", "unix:///home/dev/tests/home/instances/default/docker.sock"),
        ("using tcg: kvm does not work here", ""),
    ],
)
def test_what_differs_from_run_to_run_is_taken_out(one: str, other: str) -> None:
    assert shape(one) == shape(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("guest: kernel", "guest: initrd"),
        ("HOST  GUEST  PROTO", "HOST  GUEST"),
        ("  mounts        1", "  folders       1"),
        ("stopped", ""),
    ],
)
def test_what_does_not_is_seen(one: str, other: str) -> None:
    assert shape(one) != shape(other)


def test_the_readme_has_its_tour() -> None:
    tour = steps(README)
    assert tour[0].command == "agentctl up"
    assert tour[-1].command == "agentctl stop"
    assert all(step.output for step in tour)
