"""Debian packages for the bench VM that the guest image does not have, fetched on the host.

The guest's root is thrown away at each boot, and apt in an emulated guest takes a minute to read its lists.
So the host's apt resolves for the guest: with a private state, the guest's release as its only source and
the guest's own dpkg status as what is installed. The packages are verified by apt, kept, and fetched again
only when the guest's image is another one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from provision.recipe import Recipe

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

#: Lists of 50 MB on a slow network.
TIMEOUT = 600.0


class PackagesUnavailable(Exception):
    """The packages cannot be had on this host; the message is a sentence."""


def fetch(packages: Sequence[str], recipe: Recipe, status: str, store: Path) -> list[Path]:
    """``packages`` and what they need beyond ``status`` (the guest's /var/lib/dpkg/status), as .deb files."""
    name = hashlib.sha256("\0".join((*packages, status)).encode()).hexdigest()[:16]
    complete = store / name
    if not complete.is_dir():
        if shutil.which("apt-get") is None or not KEYRING.is_file():
            raise PackagesUnavailable("apt-get or Debian's archive keys are missing on this host")
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=store) as staging:
            _download(Path(staging), packages, recipe, status)
            (Path(staging) / "cache" / "archives").rename(complete)
    return sorted(complete.glob("*.deb"))


def _download(staging: Path, packages: Sequence[str], recipe: Recipe, status: str) -> None:
    for folder in ("state/lists/partial", "cache/archives/partial", "empty"):
        (staging / folder).mkdir(parents=True)
    (staging / "state" / "status").write_text(status)
    (staging / "sources.list").write_text(sources(recipe))
    (staging / "apt.conf").write_text(configuration(staging, recipe.architecture))
    for arguments in (["update"], ["install", "--download-only", "--no-install-recommends", "-y", *packages]):
        try:
            done = subprocess.run(
                ["apt-get", "-c", str(staging / "apt.conf"), "-qq", *arguments],
                env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PackagesUnavailable("Debian's mirror is too slow") from None
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            raise PackagesUnavailable(f"apt-get {arguments[0]} failed: {words[-1] if words else 'silently'}")


def sources(recipe: Recipe) -> str:
    """A sources.list(5) of the guest's release, without what only desktops want."""
    options = f"[arch={recipe.architecture} target=Packages signed-by={KEYRING}]"
    return (
        f"deb {options} {recipe.mirror} {recipe.suite} main\n"
        f"deb {options} {recipe.mirror} {recipe.suite}-updates main\n"
        f"deb {options} {recipe.security_mirror} {recipe.suite}-security main\n"
    )


def configuration(staging: Path, architecture: str) -> str:
    """apt.conf(5): everything below ``staging``; given by -c it is read after the host's own, whose hooks it
    clears, and whose proxies it keeps."""
    return f"""
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
APT::Architecture "{architecture}";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Dir::State "{staging}/state";
Dir::State::status "{staging}/state/status";
Dir::Cache "{staging}/cache";
Dir::Etc::sourcelist "{staging}/sources.list";
Dir::Etc::sourceparts "{staging}/empty";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "{staging}/empty";
"""
