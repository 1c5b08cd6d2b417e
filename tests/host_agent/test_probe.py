"""The accelerator probe against scripts that fail in each known way, and against the real QEMU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import probe as probing
from host_agent.errors import ExitCode, UserError
from host_agent.probe import Preference, choose, describe_qemu, first_complaint, probe
from host_agent.process import ProcessIdentity
from provision.machine import Accelerator, probe_argv

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scripts stand for KVM")

ABORTS = """
echo 'qemu-system-x86_64: warning: host lacks a feature' >&2
echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0x0' >&2
echo 'qemu-system-x86_64: kvm_buf_set_msrs: Assertion failed.' >&2
ulimit -c 0
kill -ABRT $$
"""
STOPS = "echo 'KVM internal error. Suberror: 1' >&2; exec sleep 1000"
HANGS = "exec sleep 1000"
REFUSES = "echo 'qemu-system-x86_64: -accel kvm: invalid accelerator kvm' >&2; exit 1"
WORKS = "printf '[    0.0] Linux ver'; echo 'sion 6.12'; exec sleep 1000"


class Host:
    """A machine with a scripted QEMU and a /dev/kvm that opens."""

    def __init__(self, home: Path) -> None:
        self.qemu = home / "qemu"
        self.kernel = home / "kernel"
        self.cache = home / "state" / "accelerator.json"
        self.runs = home / "runs"
        self.now = 1_000_000.0
        self.kernel.write_bytes(b"kernel")

    def install(self, body: str, version: str = "9.9.9") -> None:
        self.qemu.write_text(
            "#!/bin/sh\n"
            f"case $1 in --version) echo 'QEMU emulator version {version}'; exit;;\n"
            "-help) printf 'usage\\n-sandbox on\\n'; exit;; esac\n"
            f"echo boot >>'{self.runs}'\n{body}\n"
        )
        self.qemu.chmod(0o700)

    @property
    def boots(self) -> int:
        return len(self.runs.read_text().splitlines()) if self.runs.exists() else 0

    async def choose(self, preference: Preference = Preference.AUTO) -> probing.Verdict:
        return await choose(
            preference, qemu=self.qemu, kernel=self.kernel, cache=self.cache, clock=lambda: self.now
        )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    device = tmp_path / "kvm"
    device.touch(0o600)
    monkeypatch.setattr(probing, "KVM_DEVICE", device)
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ABORTS, "QEMU was killed by signal 6 (SIGABRT): error: failed to set MSR 0x10a to 0x0"),
        (STOPS, "QEMU stopped: KVM internal error. Suberror: 1"),
        (REFUSES, "QEMU exited with status 1: -accel kvm: invalid accelerator kvm"),
    ],
)
async def test_auto_falls_back_to_tcg_and_says_why(host: Host, body: str, reason: str) -> None:
    host.install(body)
    verdict = await host.choose()
    assert verdict.accelerator is Accelerator.TCG
    assert verdict.reason == f"kvm does not work here: {reason}"


async def test_auto_takes_what_works(host: Host) -> None:
    host.install(WORKS)
    verdict = await host.choose()
    assert verdict.accelerator is Accelerator.KVM
    assert verdict.reason.startswith("proved by a boot in ")


async def test_a_silent_qemu_fails_in_time_and_is_gone(
    host: Host, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    host.install(HANGS)
    works, reason = await probe([str(host.qemu)])
    assert (works, reason) == (False, "no console line in 5 s")
    assert trio.current_time() == pytest.approx(5.0)


async def test_nothing_survives_a_probe_of_a_wrapper_script(host: Host, tmp_path: Path) -> None:
    child = tmp_path / "child"
    host.install(f"sleep 1000 & echo $! >'{child}'; echo 'Linux version 6'; wait")
    assert (await probe([str(host.qemu)], timeout=30))[0]
    orphan = ProcessIdentity.of(int(child.read_text()))
    if orphan:
        with trio.fail_after(5):
            await orphan.wait()


async def test_a_cancelled_probe_leaves_nothing(host: Host, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    os.mkfifo(pid)
    host.install(f"echo $$ >'{pid}'; exec sleep 1000")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe, [str(host.qemu)])
        process = ProcessIdentity.of(int(await trio.Path(pid).read_text()))
        assert process is not None
        nursery.cancel_scope.cancel()
    assert not process.alive()


async def test_a_flood_of_output_is_bounded(host: Host) -> None:
    host.install("yes | head -c 3000000 >&2; yes | head -c 3000000")
    assert await probe([str(host.qemu)], timeout=60) == (False, "QEMU ended normally: y")


# --- what is asked for -----------------------------------------------------------------------------


async def test_an_accelerator_asked_for_is_proved(host: Host) -> None:
    host.install(WORKS)
    verdict = await host.choose(Preference.KVM)
    assert verdict.accelerator is Accelerator.KVM
    assert verdict.reason.startswith("asked for, proved by a boot")


async def test_an_accelerator_asked_for_that_fails_is_an_error(host: Host) -> None:
    host.install(REFUSES)
    with pytest.raises(UserError, match="kvm does not work here: QEMU exited with status 1") as caught:
        await host.choose(Preference.KVM)
    assert caught.value.exit_code is ExitCode.DEPENDENCY
    assert "tcg" in caught.value.hint


async def test_tcg_needs_no_proof(host: Host) -> None:
    host.install(REFUSES)
    assert (await host.choose(Preference.TCG)).accelerator is Accelerator.TCG
    assert host.boots == 0


async def test_hvf_is_an_error_on_linux(host: Host) -> None:
    host.install(WORKS)
    with pytest.raises(UserError, match="hvf does not work here: it does not exist on Linux"):
        await host.choose(Preference.HVF)


async def test_without_a_device_there_is_no_boot(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.install(WORKS)
    probing.KVM_DEVICE.unlink()
    verdict = await host.choose()
    assert verdict.accelerator is Accelerator.TCG
    assert "cannot be opened (No such file or directory)" in verdict.reason
    assert host.boots == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
async def test_a_device_that_may_not_be_opened_is_explained(host: Host) -> None:
    host.install(WORKS)
    probing.KVM_DEVICE.chmod(0)
    with pytest.raises(UserError, match="group kvm"):
        await host.choose(Preference.KVM)
    # Nothing of it is remembered: the next call sees the permission that was given.
    probing.KVM_DEVICE.chmod(0o600)
    assert (await host.choose(Preference.KVM)).accelerator is Accelerator.KVM


# --- the QEMU itself -------------------------------------------------------------------------------


async def test_a_missing_qemu_is_an_error(host: Host) -> None:
    with pytest.raises(UserError, match="cannot be run: No such file") as caught:
        await host.choose()
    assert caught.value.exit_code is ExitCode.DEPENDENCY
    assert caught.value.hint.startswith("Install it")


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("#!/bin/sh\n", 0o600, "Permission denied"),
        ("not a program", 0o700, "Exec format error"),
        ("#!/bin/sh\necho 'libfoo.so is missing' >&2; exit 127\n", 0o700, "status 127: libfoo.so is missing"),
    ],
)
async def test_a_qemu_that_does_not_run_is_an_error(
    host: Host, content: str, mode: int, message: str
) -> None:
    host.qemu.write_text(content)
    host.qemu.chmod(mode)
    with pytest.raises(UserError, match=message):
        await host.choose(Preference.TCG)


async def test_a_missing_kernel_is_an_error(host: Host) -> None:
    host.install(WORKS)
    host.kernel.unlink()
    with pytest.raises(UserError, match=r"kernel .* cannot be read"):
        await host.choose()


def test_first_complaint() -> None:
    assert first_complaint("") == ""
    assert first_complaint("\nqemu-system-x86_64: warning: x\nqemu-system-x86_64: bad: y\nz\n") == "bad: y"
    assert first_complaint("KVM internal error. Suberror: 1\n") == "KVM internal error. Suberror: 1"


# --- the cache -------------------------------------------------------------------------------------


async def test_a_verdict_is_remembered(host: Host) -> None:
    host.install(WORKS)
    first = await host.choose()
    host.now += 365 * 86400
    assert await host.choose() == first
    await host.choose(Preference.KVM)
    assert host.boots == 1


async def test_a_failure_is_remembered_for_a_day(host: Host) -> None:
    host.install(REFUSES)
    first = await host.choose()
    host.now += 86399
    assert await host.choose() == first
    assert host.boots == 1
    host.now += 1
    await host.choose()
    assert host.boots == 2
    host.now -= 3600  # the clock was set back: the age of the verdict is unknown
    await host.choose()
    assert host.boots == 3


@pytest.mark.parametrize("change", ["qemu", "kernel", "cpu"])
async def test_a_changed_machine_is_probed_again(
    host: Host, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.install(WORKS)
    await host.choose()
    if change == "qemu":
        host.install(WORKS, version="10.0.0")
    elif change == "kernel":
        host.kernel.write_bytes(b"another kernel")
    else:
        monkeypatch.setattr(probing, "_cpu_model", lambda: "Z80")
    await host.choose()
    assert host.boots == 2


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe{",
        b"[]",
        b"{}",
        b"null",
        b'{"key": null, "results": {}}',
        b"[" * 100_000,
        "results",
        "name",
        "type",
    ],
)
async def test_a_damaged_cache_is_ignored_and_replaced(host: Host, damage: bytes | str) -> None:
    host.install(WORKS)
    await host.choose()
    if isinstance(damage, str):
        content = json.loads(host.cache.read_bytes())
        content["results"] = {
            "results": 7,
            "name": {"xen": content["results"]["kvm"]},
            "type": {"kvm": {**content["results"]["kvm"], "works": "yes"}},
        }[damage]
        damage = json.dumps(content).encode()
    host.cache.write_bytes(damage)
    assert (await host.choose()).accelerator is Accelerator.KVM
    assert host.boots == 2
    await host.choose()
    assert host.boots == 2


async def test_a_cache_that_cannot_be_written_costs_only_a_warning(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.install(WORKS)
    host.cache.parent.write_text("a file where the folder should be")
    assert (await host.choose()).accelerator is Accelerator.KVM
    assert "cannot remember the accelerator" in caplog.text


# --- the real thing --------------------------------------------------------------------------------

QEMU = shutil.which("qemu-system-x86_64")
KERNEL = os.environ.get("AGENTCTL_TEST_KERNEL")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="needs AGENTCTL_TEST_KERNEL, an x86-64 bzImage")


@needs_qemu
async def test_real_qemu_is_described() -> None:
    described = await describe_qemu(Path(str(QEMU)))
    assert described.version.startswith("QEMU emulator version ")
    assert described.sandbox


@needs_qemu
@needs_kernel
async def test_real_tcg_passes_the_probe() -> None:
    works, reason = await probe(probe_argv(Path(str(QEMU)), Accelerator.TCG, Path(str(KERNEL))), timeout=60)
    assert works, reason


@needs_qemu
@needs_kernel
async def test_real_auto_gives_kvm_with_proof_or_tcg_with_a_reason(tmp_path: Path) -> None:
    cache = tmp_path / "accelerator.json"
    verdict = await choose(Preference.AUTO, qemu=Path(str(QEMU)), kernel=Path(str(KERNEL)), cache=cache)
    if verdict.accelerator is Accelerator.KVM:
        assert verdict.reason.startswith("proved by a boot")
    else:
        assert verdict.reason.startswith("kvm does not work here: ")
