"""The programs that an instance is made with: QEMU and what runs in it, what builds its image, and the docker CLI."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from host_agent import bulk_memory, docker_context, docker_tools, probe
from host_agent.boot import find_qemu
from host_agent.bulk_memory import NoBulkMemory
from host_agent.configuration.config import InstanceConfig
from host_agent.doctor.finding import Finding, advice, of_error, ok, problem
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from host_agent.probe import KVM_DEVICE, Preference, Qemu, Verdict
from host_agent.state import InstanceState
from provision import image as images
from provision import recipe as recipes
from provision.errors import ProvisionError
from provision.image import Image
from provision.machine import Accelerator

TRIED_QEMU: Final = (7, 2)
TO_START: Final = {"qemu-img": "qemu-utils", "mke2fs": "e2fsprogs"}
TO_BUILD: Final = {"mmdebstrap": "mmdebstrap", "tar": "tar", "mke2fs": "e2fsprogs"}
"""Programs, and the packages of Debian and Ubuntu that have them."""

_SBIN: Final = "/usr/sbin:/sbin"
_NAMESPACE_TIME: Final = 10.0
_CPU: Final = Path("/proc/cpuinfo")


# --- QEMU ------------------------------------------------------------------------------------------


async def qemu() -> tuple[Qemu | None, list[Finding]]:
    try:
        found = await probe.describe_qemu(find_qemu())
    except UserError as error:
        return None, [of_error("qemu", error)]
    findings = []
    version = re.search(r"version (\d+)\.(\d+)", found.version)
    if version is not None and (int(version[1]), int(version[2])) < TRIED_QEMU:
        tried = ".".join(map(str, TRIED_QEMU))
        findings.append(
            advice("qemu", f"{found.version}: nothing below {tried} was tried", "install a newer one")
        )
    if not found.sandbox:
        findings.append(
            advice(
                "qemu",
                f"{found.version}: it was built without seccomp, and does not confine itself",
                "install one that was, like Debian's and Ubuntu's",
            )
        )
    return found, findings or [ok("qemu", f"{found.version}, {found.path}")]


def missing_programs(names: dict[str, str]) -> tuple[str, ...]:
    """Those of ``names`` that are not there. mke2fs is not on the path of ordinary users."""
    path = f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"
    return tuple(name for name in names if shutil.which(name, path=path) is None)


def programs() -> Iterator[Finding]:
    """What each start needs beside QEMU."""
    if missing := missing_programs(TO_START):
        yield _install("programs", missing, TO_START)


def _install(topic: str, missing: tuple[str, ...], names: dict[str, str]) -> Finding:
    packages = " ".join(dict.fromkeys(names[name] for name in missing))
    be = "is" if len(missing) == 1 else "are"
    return problem(
        topic,
        f"{', '.join(missing)} {be} missing",
        f"sudo apt-get install {packages}",
        ExitCode.DEPENDENCY,
    )


async def shared_memory(found: Qemu, config: InstanceConfig) -> Finding:
    if not config.bulk:
        return advice("bulk data", "no memory is shared with the VM: asked for", "agentctl up --bulk")
    try:
        await bulk_memory.check_device(found.path)
    except NoBulkMemory as reason:
        return advice(
            "bulk data",
            f"no memory is shared with the VM, which makes data slow: {reason}",
            "install a QEMU that has it, like Debian's and Ubuntu's",
        )
    return ok("bulk data", "QEMU can share memory with the VM")


async def accelerator(
    found: Qemu,
    config: InstanceConfig,
    image: Image | None,
    home: Home,
    last: InstanceState,
    *,
    running: bool,
) -> Finding:
    """What runs the VM; where it does not run, what would, which may take a probe of some seconds."""
    verdicts = home.cache / "accelerators.json"
    if running and last.accelerator:
        return judged(Verdict(Accelerator(last.accelerator), last.accelerator_reason), verdicts)
    wanted = Preference(config.accelerator)
    if image is None:
        if wanted is not Preference.TCG and (obstacle := probe.obstacle()):
            if wanted is not Preference.AUTO:
                hint = "agentctl up --accel auto, or: "
                return problem("accelerator", obstacle, hint + _way_to_kvm(verdicts), ExitCode.DEPENDENCY)
            return judged(Verdict(Accelerator.TCG, obstacle), verdicts)
        return ok("accelerator", f"{wanted.value}; the first start finds out whether it works")
    try:
        verdict = await probe.choose(wanted, qemu=found.path, kernel=image.kernel, cache=verdicts)
    except UserError as error:
        return of_error("accelerator", error)
    return judged(verdict, verdicts)


def judged(verdict: Verdict, verdicts: Path) -> Finding:
    """Emulation is slow by a factor of ten, which is said, unless it was asked for. ``verdicts``: where it is kept."""
    said = f"{verdict.accelerator.value}: {verdict.reason}" if verdict.reason else verdict.accelerator.value
    if verdict.accelerator is not Accelerator.TCG or verdict.reason == "asked for":
        return ok("accelerator", said)
    return advice(
        "accelerator", f"the VM is emulated, which is slow: {verdict.reason}", _way_to_kvm(verdicts)
    )


def _way_to_kvm(verdicts: Path) -> str:
    """What makes a hypervisor work here. The flags are the CPU's own, and a VM's if it lets guests nest."""
    if sys.platform != "linux":
        return "see: sysctl kern.hv_support"
    flags = _cpu_flags()
    if not KVM_DEVICE.exists():
        if flags & {"vmx", "svm"}:
            return f"sudo modprobe {'kvm_intel' if 'vmx' in flags else 'kvm_amd'}"
        if "hypervisor" in flags:
            return "this machine is a VM itself: allow nested virtualisation where it is run"
        return "switch virtualisation (VT-x, AMD-V, SVM) on in the firmware's settings"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return "sudo usermod -aG kvm $(id -un), then log in again"
    return f"see the reason; it is tried again a day later, or after: rm {shlex.quote(str(verdicts))}"


def _cpu_flags() -> set[str]:
    try:
        lines = _CPU.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


# --- the image -------------------------------------------------------------------------------------


def image(home: Home, runtime: str = recipes.DOCKER) -> tuple[Image | None, list[Finding]]:
    try:
        recipe = recipes.load(runtime=runtime)
    except ProvisionError as error:
        return None, [of_error("image", error)]
    found = images.find(home.images, recipe.digest)
    if found is not None:
        return found, [ok("image", f"{recipe.digest}, Debian {recipe.suite}")]
    if missing := missing_programs(TO_BUILD):
        return None, [_install("image", missing, TO_BUILD)]
    said = f"{recipe.digest} is not there yet; the next start builds it, which takes some minutes"
    if os.geteuid() == 0 or _namespaces_work():
        return None, [ok("image", said)]
    if shutil.which("sudo") is not None:
        return None, [ok("image", f"{said}, and needs sudo")]
    return None, [
        problem(
            "image",
            "the image cannot be built as this user: neither user namespaces nor sudo can be used",
            "sudo apt-get install uidmap, then sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535"
            " $(id -un)",
            ExitCode.RESOURCES,
        )
    ]


def _namespaces_work() -> bool:
    """Whether this user gets to own files as root (``provision.commands``), which AppArmor may forbid."""
    command = ["unshare", "--map-auto", "--map-root-user", "--", "true"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_NAMESPACE_TIME,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return shutil.which("newuidmap") is not None and done.returncode == 0


# --- docker ----------------------------------------------------------------------------------------


async def docker(home: Home, paths: InstancePaths) -> list[Finding]:
    """The command line on this machine; the daemon is the VM's."""
    tools = await docker_tools.detect(home.tools)
    findings = []
    if missing := [tool.name for tool in tools.missing]:
        what = (
            f"{', '.join(missing)} of the docker command line {'is' if len(missing) == 1 else 'are'} missing"
        )
        if docker_tools.can_install():
            findings.append(ok("docker", f"{what}; the next start unpacks Debian's, for you alone"))
        else:
            findings.append(advice("docker", what, docker_tools.INSTALL_HINT))
    name = docker_context.context_name(paths.name)
    if warning := docker_context.override_warning(os.environ, name, paths.docker_socket):
        variables = [variable for variable in ("DOCKER_HOST", "DOCKER_CONTEXT") if variable in os.environ]
        findings.append(advice("docker", warning, f"unset {' '.join(variables)}"))
    if unusable := docker_context.unusable(docker_context.config_dir(os.environ)):
        findings.append(advice("docker", unusable, 'correct it, or use: eval "$(agentctl env)"'))
    return findings or [ok("docker", f"{tools.docker}, with compose and buildx")]
