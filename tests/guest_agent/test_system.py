from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock as Clock

from guest_agent import accounts
from guest_agent.clock import TOLERANCE_NS
from guest_agent.system import ANSWER_FIRST, Kernel, System, read_meminfo
from protocol.api import Configure, Done, GetGuestInfo, GetHostKeys, Shutdown
from protocol.errors import ErrorCode, RpcError

NOW = 1_800_000_000 * 10**9
CONFIGURE = Configure("vm", NOW, "jo", 1000, ["ssh-ed25519 AAAA jo@host", "ssh-rsa BBBB"])


class RecordingKernel(Kernel):
    def __init__(self) -> None:
        self.hostname = ""
        self.clock = NOW
        self.powered_off_at: float | None = None
        self.error: Exception | None = None

    def set_hostname(self, name: str) -> None:
        if self.error:
            raise self.error
        self.hostname = name

    def now_ns(self) -> int:
        return self.clock

    def set_clock(self, now_ns: int) -> None:
        self.clock = now_ns

    async def power_off(self) -> None:
        if self.error:
            raise self.error
        self.powered_off_at = trio.current_time()


@pytest.fixture
def kernel() -> RecordingKernel:
    return RecordingKernel()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accounts.os, "geteuid", lambda: 12345)  # nobody may chown here
    for folder in ("etc", "proc", "var/lib/agentctl"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/hosts").write_text("127.0.0.1\tlocalhost\n127.0.1.1\told\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2048 kB\nMemAvailable: 1024 kB\nHugePages: 0\n")
    (tmp_path / "proc/uptime").write_text("12.34 20.00\n")
    return tmp_path


@pytest.fixture
def system(nursery: trio.Nursery, root: Path, kernel: RecordingKernel) -> System:
    return System(nursery, lambda: "tracefs", root, kernel)


async def test_a_configuration_is_taken_and_taken_again(
    system: System, root: Path, kernel: RecordingKernel
) -> None:
    for _ in range(2):
        assert (await system.configure(CONFIGURE)).clock_step_ns == 0
        assert kernel.hostname == "vm"
        assert (root / "etc/hostname").read_text() == "vm\n"
        assert (root / "etc/hosts").read_text() == "127.0.0.1\tlocalhost\n127.0.1.1 vm\n"
        keys = root / "etc/agentctl/authorized_keys"
        assert keys.read_text() == "ssh-ed25519 AAAA jo@host\nssh-rsa BBBB\n"
        assert keys.stat().st_mode & 0o7777 == 0o644
        assert (root / "etc/passwd").read_text() == "jo:x:1000:1000::/home/jo.guest:/bin/bash\n"
        assert (root / "home/jo.guest").is_dir()
        assert system.default_user == "jo"


async def test_keys_that_are_no_longer_sent_are_no_longer_taken(system: System, root: Path) -> None:
    await system.configure(CONFIGURE)
    await system.configure(Configure("vm", NOW, "jo", 1000, []))
    assert (root / "etc/agentctl/authorized_keys").read_text() == ""


async def test_a_guest_without_hosts_gets_localhost(system: System, root: Path) -> None:
    (root / "etc/hosts").unlink()
    await system.configure(CONFIGURE)
    assert (root / "etc/hosts").read_text() == "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 vm\n"


@pytest.mark.parametrize(
    ("off", "stepped"),
    [
        (0, False),
        (TOLERANCE_NS, False),
        (-TOLERANCE_NS, False),
        (TOLERANCE_NS + 1, True),
        (-3600 * 10**9, True),
    ],
)
async def test_the_clock_is_stepped_if_it_is_far_off(
    system: System, kernel: RecordingKernel, off: int, stepped: bool
) -> None:
    kernel.clock = NOW - off
    assert (await system.configure(CONFIGURE)).clock_step_ns == (off if stepped else 0)
    assert kernel.clock == (NOW if stepped else NOW - off)


@pytest.mark.parametrize(
    "request_",
    [
        Configure("", NOW, "jo", 1000),
        Configure("a b", NOW, "jo", 1000),
        Configure("-a", NOW, "jo", 1000),
        Configure("a\nb", NOW, "jo", 1000),
        Configure("a" * 65, NOW, "jo", 1000),
        Configure("vm", NOW, "j:o", 1000),
        Configure("vm", NOW, "jo", -1),
        Configure("vm", -5, "jo", 1000),
        Configure("vm", NOW, "jo", 1000, ["ssh-rsa A\ncommand=... ssh-rsa B"]),
    ],
)
async def test_a_configuration_that_makes_no_sense_changes_nothing(
    system: System, root: Path, kernel: RecordingKernel, request_: Configure
) -> None:
    with pytest.raises(RpcError) as caught:
        await system.configure(request_)
    assert caught.value.code is ErrorCode.INVALID
    assert kernel.hostname == ""
    assert not (root / "etc/passwd").exists()


async def test_an_agent_that_may_not_says_so(system: System, kernel: RecordingKernel) -> None:
    kernel.error = PermissionError(1, "Operation not permitted")
    with pytest.raises(RpcError) as caught:
        await system.configure(CONFIGURE)
    assert caught.value.code is ErrorCode.DENIED


async def test_figures_of_the_guest(system: System) -> None:
    info = await system.guest_info(GetGuestInfo())
    assert (info.memory_total, info.memory_available) == (2048 * 1024, 1024 * 1024)
    assert (info.uptime, info.kernel, info.port_detection) == (12.34, os.uname().release, "tracefs")
    assert info.cpus == len(os.sched_getaffinity(0))
    assert (info.data_total, info.data_free) == (0, 0)  # a folder, not a disk


async def test_a_data_disk_is_measured(system: System, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == root / "var/lib/agentctl")
    info = await system.guest_info(GetGuestInfo())
    assert info.data_total > info.data_free > 0


async def test_the_real_machine_has_figures(nursery: trio.Nursery) -> None:
    info = await System(nursery, lambda: "polling").guest_info(GetGuestInfo())
    assert info.memory_total > info.memory_available > 0
    assert info.uptime > 0


async def test_a_shutdown_is_answered_before_it_begins(
    autojump_clock: Clock, system: System, kernel: RecordingKernel
) -> None:
    started = trio.current_time()
    assert await system.shutdown(Shutdown()) == Done()
    assert kernel.powered_off_at is None
    await trio.sleep(1)
    assert kernel.powered_off_at == pytest.approx(started + ANSWER_FIRST)


async def test_a_shutdown_that_fails_does_not_end_the_agent(
    autojump_clock: Clock, system: System, kernel: RecordingKernel
) -> None:
    kernel.error = OSError("systemctl is not here")
    await system.shutdown(Shutdown())
    await trio.sleep(1)


def test_meminfo_is_in_bytes() -> None:
    assert read_meminfo("MemTotal:       16 kB\nHugePages_Total:       3\n") == {"MemTotal": 16384}


async def test_the_keys_of_its_sshd_once_the_data_disk_is_there(system: System, root: Path) -> None:
    assert (await system.host_keys(GetHostKeys())).keys == []
    folder = root / "var/lib/agentctl/ssh"
    folder.mkdir()
    (folder / "ssh_host_ed25519_key").write_text("secret")
    (folder / "ssh_host_ed25519_key.pub").write_text("ssh-ed25519 AAAA vm\n")
    assert (await system.host_keys(GetHostKeys())).keys == ["ssh-ed25519 AAAA vm"]
