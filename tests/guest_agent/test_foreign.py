from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from guest_agent.foreign import ARCHITECTURES, KEPT, REGISTRY, ForeignPrograms, run_program
from protocol.api import UseArchitectures
from protocol.errors import ErrorCode, RpcError


class Guest:
    """A root of its own; apt, tar and mount do what is needed of them."""

    def __init__(self, root: Path, machine: str = "x86_64") -> None:
        self.root = root
        self.kept = root / KEPT
        self.registry = root / REGISTRY
        self.registry.mkdir(parents=True)
        self.ran: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.machine = machine
        self.again()

    def again(self) -> None:
        self.programs = ForeignPrograms(self.root, machine=self.machine, run=self._run)

    def reboot(self) -> None:
        """What the kernel knows is forgotten; the data disk stays."""
        for path in self.registry.iterdir():
            path.unlink()
        self.ran.clear()
        self.again()

    def _run(self, argv: Sequence[str], timeout: float, folder: Path) -> None:
        program = argv[0] if argv[0] != "apt-get" else argv[4]
        self.ran.append(program)
        if program in self.fails:
            raise self.fails[program]
        match program:
            case "mount":
                (self.registry / "register").write_text("")
            case "download":
                (folder / "qemu-user_1_amd64.deb").write_text("")
            case "bash":
                for name in argv[6:]:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_text("an emulator")

    async def use(self, *names: str) -> list[str]:
        return (await self.programs.use(UseArchitectures(list(names)))).problems

    @property
    def told(self) -> str:
        return (self.registry / "register").read_text()


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


FETCH = ["update", "download", "bash"]


async def test_an_emulator_is_fetched_once_and_told_to_the_kernel_at_each_boot(guest: Guest) -> None:
    assert await guest.use("arm64") == []
    assert guest.ran == ["mount", *FETCH]
    assert [path.name for path in guest.kept.iterdir()] == ["qemu-aarch64"]
    magic = r"\x7f\x45\x4c\x46\x02\x01\x01" + r"\x00" * 9 + r"\x02\x00\xb7\x00"
    mask = r"\xff" * 7 + r"\x00" + r"\xff" * 8 + r"\xfe\xff\xff\xff"
    line = f":qemu-aarch64:M::{magic}:{mask}:{guest.kept}/qemu-aarch64:POCF"
    assert guest.told == line
    guest.reboot()
    assert await guest.use("arm64") == []
    assert (guest.ran, guest.told) == (["mount"], line)


async def test_the_next_session_does_nothing(guest: Guest) -> None:
    await guest.use("arm64")
    (guest.registry / "qemu-aarch64").write_text("enabled")
    (guest.registry / "register").write_text("")
    guest.ran.clear()
    guest.again()
    assert await guest.use("arm64") == []
    assert (guest.ran, guest.told) == ([], "")


async def test_another_one_is_fetched_beside_it_and_the_rest_forgotten(guest: Guest) -> None:
    await guest.use("arm64")
    rules = {name: guest.registry / name for name in ("qemu-aarch64", "qemu-mine", "python")}
    for rule in rules.values():
        rule.write_text("enabled")
    await guest.use("riscv64", "s390x")
    assert sorted(path.name for path in guest.kept.iterdir()) == [
        "qemu-aarch64",
        "qemu-riscv64",
        "qemu-s390x",
    ]
    assert [rule.read_text() for rule in rules.values()] == ["-1", "enabled", "enabled"]


def test_big_endian_ones_are_the_other_way_round() -> None:
    magic, mask = ARCHITECTURES["s390x"].rule
    assert magic.endswith(r"\x02\x02\x01" + r"\x00" * 9 + r"\x00\x02\x00\x16")
    assert mask.endswith(r"\xff\xfe\xff\xff")
    assert ARCHITECTURES["armhf"].rule[0].endswith(r"\x01\x01\x01" + r"\x00" * 9 + r"\x02\x00\x28\x00")


@pytest.mark.parametrize("names", [[], ["amd64", "i386"]])
async def test_what_the_processor_runs_takes_nothing(guest: Guest, names: list[str]) -> None:
    assert await guest.use(*names) == []
    assert (guest.ran, guest.kept.exists()) == ([], False)


async def test_on_arm_it_is_the_other_one(tmp_path: Path) -> None:
    guest = Guest(tmp_path, "aarch64")
    assert await guest.use("arm64", "amd64") == []
    assert "qemu-x86_64" in guest.told


@pytest.mark.parametrize(
    ("program", "error", "said"),
    [
        ("mount", OSError(2, "No such file or directory"), "No such file"),
        (
            "update",
            subprocess.CalledProcessError(100, ["apt-get"], stderr=b"E: no\n  network\n"),
            "E: no network",
        ),
        ("download", subprocess.CalledProcessError(100, ["apt-get"], stderr=b""), "non-zero exit status 100"),
        ("download", subprocess.TimeoutExpired(["apt-get"], 900), "apt-get takes more than 900 s"),
        ("bash", OSError(28, "No space left on device"), "No space left"),
    ],
)
async def test_what_cannot_be_is_said_and_nothing_half_is_kept(
    guest: Guest, program: str, error: Exception, said: str
) -> None:
    guest.fails[program] = error
    (problem,) = await guest.use("arm64")
    assert problem.startswith("the VM runs no programs of arm64: ")
    assert said in problem
    assert not guest.kept.exists() or list(guest.kept.iterdir()) == []
    guest.fails.clear()
    assert await guest.use("arm64") == []


async def test_what_the_kernel_refuses_is_said_of_each(guest: Guest) -> None:
    (guest.registry / "register").mkdir()
    assert await guest.use("arm64", "riscv64") == [
        "the VM runs no programs of arm64: Is a directory",
        "the VM runs no programs of riscv64: Is a directory",
    ]


async def test_one_that_is_not_known_is_refused_with_nothing_done(guest: Guest) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.use("arm64", "pdp11")
    assert caught.value.code is ErrorCode.INVALID
    assert guest.ran == []


def test_programs_run_where_they_are_to(tmp_path: Path) -> None:
    run_program(["sh", "-c", "pwd >out"], 10, tmp_path)
    assert (tmp_path / "out").read_text() == f"{tmp_path}\n"
    with pytest.raises(subprocess.CalledProcessError):
        run_program(["false"], 10, tmp_path)
