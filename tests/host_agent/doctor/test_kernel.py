from __future__ import annotations

import errno
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host_agent.doctor import kernel
from host_agent.doctor.finding import Finding, Level
from host_agent.doctor.kernel import Limits, findings

WELL = Limits(0, "6.1.0-13-amd64", 1 << 17, 16384, 128, 1, 1 << 20)


def looked(**changes: Any) -> list[Finding]:
    return list(findings(replace(WELL, **changes)))


def test_all_is_well() -> None:
    (finding,) = looked()
    assert (finding.level, finding.topic) == (Level.OK, "watching")
    assert "131072" in finding.message
    assert looked(events=None, groups=None, leases=None) == [finding], "a kernel without these limits"


@pytest.mark.parametrize(
    ("changes", "said", "fix"),
    [
        ({"marks": 8192}, "8192 files and folders are watched", "fs.fanotify.max_user_marks=524288"),
        ({"events": 1000}, "1000 changes may wait", "fs.fanotify.max_queued_events=16384"),
        ({"groups": 4}, "4 filesystems are watched", "fs.fanotify.max_user_groups=128"),
        ({"leases": 0}, "fs.leases-enable is 0", "fs.leases-enable=1"),
        ({"refused": errno.EMFILE}, "all watchers that you may have", "fs.fanotify.max_user_groups=256"),
    ],
)
def test_a_limit_is_told_with_the_sysctl_that_raises_it(
    changes: dict[str, int], said: str, fix: str, tmp_path: Path
) -> None:
    (finding,) = looked(**changes)
    assert (finding.level, finding.topic) == (Level.ADVICE, "watching")
    assert said in finding.message
    # What it says can be typed: here by somebody whose sudo, tee and sysctl write elsewhere.
    (tmp_path / "sudo").write_text('#!/bin/sh\ntest "$1" = tee && exec cat\nprintf "%s " "$@"\n')
    (tmp_path / "sudo").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", finding.fix],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{fix}\nsysctl -p /etc/sysctl.d/60-agentctl.conf "


@pytest.mark.parametrize(
    ("changes", "said", "fix"),
    [
        ({"refused": errno.EPERM, "release": "5.10.0-28-amd64"}, "lets only root", "use Linux 5.13 or newer"),
        ({"refused": errno.EINVAL, "release": "4.19"}, "lets only root", "use Linux 5.13 or newer"),
        ({"refused": errno.ENOSYS, "release": "5.10"}, "does not let you watch", "CONFIG_FANOTIFY"),
        ({"refused": errno.EPERM, "release": "6.1.0"}, "does not let you watch", "container"),
        ({"refused": errno.EPERM, "release": "odd"}, "lets only root", "use Linux 5.13 or newer"),
    ],
)
def test_a_kernel_that_refuses(changes: dict[str, Any], said: str, fix: str) -> None:
    (finding,) = looked(marks=8192, **changes)
    assert finding.level is Level.ADVICE
    assert said in finding.message
    assert fix in finding.fix


def test_few_descriptors() -> None:
    watching, finding = looked(descriptors=1024)
    assert watching.level is Level.OK
    assert (finding.level, finding.topic) == (Level.ADVICE, "descriptors")
    assert "1024" in finding.message
    assert looked(descriptors=resource.RLIM_INFINITY) == [watching]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")
def test_this_machine_is_measured() -> None:
    measured = kernel.measure()
    assert measured.marks >= 8192
    assert measured.leases == 1
    assert measured.events is not None
    assert measured.refused in (0, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EMFILE)
    assert list(kernel.check()) == list(findings(measured))
