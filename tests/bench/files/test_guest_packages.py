from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from provision import recipe as recipes
from tests.bench.files import guest_packages
from tests.bench.files.guest_packages import PackagesUnavailable

RECIPE = dataclasses.replace(recipes.load(machine="x86_64"), suite="forky", mirror="http://mirror/debian")


def test_packages_come_from_the_guests_release() -> None:
    lines = guest_packages.sources(RECIPE).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(" http://mirror/debian forky main")
    assert all("arch=amd64" in line and "signed-by=" in line for line in lines)


def test_apt_keeps_to_its_own_directory(tmp_path: Path) -> None:
    text = guest_packages.configuration(tmp_path, "amd64")
    folders = [line for line in text.splitlines() if line.startswith("Dir::")]
    assert len(folders) == 7
    assert all(str(tmp_path) in line or "/dev/null" in line for line in folders)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose apt-get downloads one package, and counts how often it is run."""
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\nset -e\necho "$@" >>"${0%/*}/runs"\nstate=${2%/apt.conf}\n'
        'case "$*" in *update*) ;; *) touch "$state/cache/archives/sshfs_1_amd64.deb" ;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(guest_packages, "KEYRING", program)
    return program.parent


def test_packages_are_fetched_once_for_a_guest(apt: Path, tmp_path: Path) -> None:
    for status in ("one guest", "one guest", "another guest"):
        [package] = guest_packages.fetch(["sshfs"], RECIPE, status, tmp_path / "store")
        assert package.name == "sshfs_1_amd64.deb"
    assert len((apt / "runs").read_text().splitlines()) == 4


def test_a_failed_download_leaves_nothing_and_says_why(apt: Path, tmp_path: Path) -> None:
    (apt / "apt-get").write_text("#!/bin/sh\necho 'E: no network' >&2; exit 100\n")
    with pytest.raises(PackagesUnavailable, match="no network"):
        guest_packages.fetch(["sshfs"], RECIPE, "", tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_without_apt_there_are_no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackagesUnavailable, match="apt-get"):
        guest_packages.fetch(["sshfs"], RECIPE, "", tmp_path / "store")
    with pytest.raises(FileNotFoundError):
        subprocess.run(["apt-get"], check=False)
