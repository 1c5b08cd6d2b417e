"""Building an image with stand-ins for mmdebstrap and mke2fs: what a store holds, however it went."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from provision import bootstrap, commands, image, recipe
from provision import manifest as manifests
from provision.errors import ProvisionError
from provision.image import Image
from provision.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]

MMDEBSTRAP = """#!/bin/sh
echo "$$" >>"{base}/started"
echo "$*" >"{base}/command"
echo "I: installing packages..." >&2
if [ -e "{base}/fail" ]; then cat "{base}/fail" >&2; exit 25; fi
if [ -e "{base}/hang" ]; then sleep 60 & echo "$!" >>"{base}/started"; wait; fi
while [ -e "{base}/wait" ]; do sleep 0.05; done
exec cat "{base}/root.tar"
"""

MKE2FS = """#!/bin/sh
if [ -e "{base}/fail-mke2fs" ]; then echo "mke2fs: Could not allocate block" >&2; exit 1; fi
for last; do :; done
printf filesystem | dd of="$last" conv=notrunc status=none
"""

# What runs a build in a process of its own.
BUILDER = """
import sys
from dataclasses import replace
from pathlib import Path
from provision import commands, image, recipe
commands.find_privilege = lambda: commands.Privilege((), ("mmdebstrap",))
image.BUILD_SPACE = 0
try:
    image.ensure(Path(sys.argv[1]), replace(recipe.load(), root_size=1 << 20, alone_modules=(), initrd_modules=("virtio_blk",), bulk_modules=()),
                 lambda text: print(text, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def root_tar() -> bytes:
    """A root filesystem as small as the build lets it be."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in {
            "boot/vmlinuz-6.12": b"kernel",
            "bin/busybox": b"busybox",
            "lib/modules/6.12/modules.dep": b"kernel/virtio_blk.ko:\n",
            "lib/modules/6.12/modules.builtin": b"",
            "lib/modules/6.12/kernel/virtio_blk.ko": b"ELF",
            "usr/lib/agentctl/packages": b"docker.io\t26.1\nsystemd\t257\n",
            "dev/null": b"not wanted",
        }.items():
            info = tarfile.TarInfo("./" + name)
            info.size, info.mode, info.uid, info.gid = len(content), 0o644, os.geteuid(), os.getegid()
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files (fail, hang, wait ...) say what the stand-ins do."""
    base = tmp_path / "tools"
    (base / "bin").mkdir(parents=True)
    (base / "root.tar").write_bytes(root_tar())
    for name, script in (("mmdebstrap", MMDEBSTRAP), ("mke2fs", MKE2FS)):
        path = base / "bin" / name
        path.write_text(script.format(base=base))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{base / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(commands, "find_privilege", lambda: commands.Privilege((), ("mmdebstrap",)))
    monkeypatch.setattr(image, "BUILD_SPACE", 0)
    return base


@pytest.fixture
def small() -> Recipe:
    return replace(
        recipe.load(), root_size=1 << 20, alone_modules=(), initrd_modules=("virtio_blk",), bulk_modules=()
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "images"


def ensure(store: Path, wanted: Recipe) -> tuple[Image, list[str]]:
    told: list[str] = []
    return image.ensure(store, wanted, told.append), told


def contents(store: Path) -> set[str]:
    return {path.name for path in store.iterdir()} - {".lock"}


def test_an_image_is_built_once(tools: Path, store: Path, small: Recipe) -> None:
    built, told = ensure(store, small)
    assert built.directory == store / small.digest
    assert built.kernel.read_bytes() == b"kernel"
    assert built.initrd.read_bytes().startswith(b"070701")
    assert built.root.stat().st_size == 1 << 20
    assert built.root.read_bytes().startswith(b"filesystem")
    assert built.manifest.packages == {"docker.io": "26.1", "systemd": "257"}
    assert built.manifest.kernel_release == "6.12"
    assert set(built.manifest.sha256) == {"kernel", "initrd", "root.img"}
    assert told[:2] == ["installing Debian trixie packages", "installing packages"]
    assert contents(store) == {small.digest}
    assert not (built.directory / "root").exists()
    again, told = ensure(store, small)
    assert (again, told) == (built, [])
    assert len((tools / "started").read_text().split()) == 1


def test_what_mmdebstrap_is_asked_for(small: Recipe) -> None:
    command = bootstrap.mmdebstrap_command(small, Path("/x/overlay.tar"), ("mmdebstrap", "--mode=root"))
    assert command[:2] == ["mmdebstrap", "--mode=root"]
    assert "--variant=apt" in command
    assert f"--architectures={small.architecture}" in command
    assert any(word.startswith("--include=systemd,") and ",docker.io," in word for word in command)
    at = command.index("trixie")
    assert command[at + 1] == "-"
    assert all(line.startswith("deb http") for line in command[at + 2 :])


def test_the_overlays_path_may_have_spaces(small: Recipe) -> None:
    """mmdebstrap splits the words of its own hooks (Text::ParseWords), as shlex does."""
    overlay = Path("/a home/it's/overlay.tar")
    command = bootstrap.mmdebstrap_command(small, overlay, ("mmdebstrap",))
    hooks = [word.removeprefix("--customize-hook=") for word in command if "=tar-in " in word]
    assert [shlex.split(hook) for hook in hooks] == [["tar-in", str(overlay), "/"]] * 2


def test_the_guests_files_are_roots_whatever_the_checkout_says(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir(mode=0o700)
    (tmp_path / "etc/a").touch(mode=0o600)
    (tmp_path / "etc/b").touch(mode=0o711)
    with tarfile.open(fileobj=io.BytesIO(bootstrap.guest_overlay(tmp_path))) as archive:
        assert {info.name: (info.mode, info.uid) for info in archive} == {
            "etc": (0o755, 0),
            "etc/a": (0o644, 0),
            "etc/b": (0o755, 0),
        }


@pytest.mark.parametrize("missing", ["kernel", "initrd", "root.img", "manifest.json"])
def test_half_an_image_is_none(tools: Path, store: Path, small: Recipe, missing: str) -> None:
    built, _ = ensure(store, small)
    (built.directory / missing).unlink()
    assert image.find(store, small.digest) is None
    again, told = ensure(store, small)
    assert told
    assert (again.directory / missing).exists()


def test_a_damaged_manifest_is_none(tools: Path, store: Path, small: Recipe) -> None:
    built, _ = ensure(store, small)
    manifest = built.directory / manifests.MANIFEST
    for content in (b"", b"{", b"[]", json.dumps({"digest": "x"}).encode()):
        manifest.write_bytes(content)
        assert image.find(store, small.digest) is None
    assert image.find(store, "another") is None


def test_a_build_directory_is_never_found_and_swept_by_the_next_build(
    tools: Path, store: Path, small: Recipe
) -> None:
    built, _ = ensure(store, small)
    built.directory.rename(store / f".build-{small.digest}")
    (store / ".build-older").mkdir()
    assert image.find(store, small.digest) is None
    ensure(store, small)
    assert contents(store) == {small.digest}


@pytest.mark.parametrize(
    ("words", "sentence", "hint"),
    [
        ("E: cannot resolve deb.debian.org\nI: cleaning up", "cannot resolve deb.debian.org", "mirror"),
        ("E: write failed: No space left on device", "No space left on device", "free some space"),
    ],
)
def test_a_failed_download_leaves_the_store_as_it_was_and_its_log(
    tools: Path, store: Path, small: Recipe, words: str, sentence: str, hint: str
) -> None:
    other, _ = ensure(store, replace(small, digest="0" * 16))
    (tools / "fail").write_text(words + "\n")
    with pytest.raises(ProvisionError) as caught:
        ensure(store, small)
    assert sentence in caught.value.message
    assert hint in caught.value.hint
    assert str(store / "failed-build.log") in caught.value.hint
    assert words in (store / "failed-build.log").read_text()
    assert contents(store) == {other.directory.name, "failed-build.log"}
    (tools / "fail").unlink()
    ensure(store, small)


def test_a_filesystem_that_does_not_fit_is_a_sentence(tools: Path, store: Path, small: Recipe) -> None:
    (tools / "fail-mke2fs").touch()
    with pytest.raises(ProvisionError, match="mke2fs failed: mke2fs: Could not allocate block") as caught:
        ensure(store, small)
    assert "disk is not full" in caught.value.hint
    assert contents(store) == {"failed-build.log"}


def test_a_full_disk_is_a_sentence(
    tools: Path, store: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ProvisionError, match="No space left on device") as caught:
        ensure(store, small)
    assert "free some space" in caught.value.hint
    assert image.find(store, small.digest) is None
    assert not list(store.glob(".build-*"))


def test_a_disk_that_is_too_small_is_noticed_before_the_download(
    tools: Path, store: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "BUILD_SPACE", 1 << 60)
    with pytest.raises(ProvisionError, match=r"GiB in .* are free"):
        ensure(store, small)
    assert not (tools / "started").exists()


def test_missing_tools_are_named(
    tools: Path, store: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(store))
    with pytest.raises(ProvisionError, match="needs mmdebstrap, tar, e2fsprogs") as caught:
        ensure(store, small)
    assert "apt-get install mmdebstrap tar e2fsprogs" in caught.value.hint


# --- builds in processes of their own ----------------------------------------------------------------


def builder(store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(store)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def started(tools: Path) -> list[int]:
    try:
        return [int(pid) for pid in (tools / "started").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.fixture
def builders(store: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        processes.append(builder(store))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def gone(pid: int) -> bool:
    """Also where the pid is another process's by now: pids come around."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie has none
    except OSError:
        return True
    return b"mmdebstrap" not in words and b"sleep\x0060" not in words


def test_an_interrupted_build_leaves_no_process_and_no_directory(
    tools: Path, store: Path, builders: Callable[[], subprocess.Popen[str]]
) -> None:
    (tools / "hang").touch()
    process = builders()
    until(lambda: len(started(tools)) == 2)
    assert list(store.glob(".build-*"))
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    until(lambda: all(map(gone, started(tools))))
    assert contents(store) <= {"failed-build.log"}
    (tools / "hang").unlink()
    assert builders().wait(20) == 0


def test_two_at_once_build_once(
    tools: Path, store: Path, builders: Callable[[], subprocess.Popen[str]]
) -> None:
    (tools / "wait").touch()
    first = builders()
    until(lambda: started(tools))
    second = builders()
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting for another build of an image to finish\n"
    (tools / "wait").unlink()
    outputs = [process.communicate(timeout=20)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert outputs[1] == ""
    assert len(started(tools)) == 1


def test_a_builder_that_was_killed_does_not_stand_in_the_way(
    tools: Path, store: Path, builders: Callable[[], subprocess.Popen[str]]
) -> None:
    (tools / "hang").touch()
    process = builders()
    until(lambda: len(started(tools)) == 2)
    process.kill()
    process.wait()
    for pid in started(tools):
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
    (tools / "hang").unlink()
    assert builders().wait(20) == 0
    assert contents(store) == {recipe.load().digest}
