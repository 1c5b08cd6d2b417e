from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from host_agent.remote import payload
from protocol.build import digest

#: What stands for the agent where the launcher is what is tested.
ENTRY = b"""
def main(words):
    print(__file__, words, flush=True)
    if words == ["wait"]:
        input()
    return 7
"""
AGENT = {
    "guest_agent/__init__.py": b"",
    "guest_agent/remote/__init__.py": b"",
    "guest_agent/remote/__main__.py": ENTRY,
}


def launch(
    archive: Path, home: Path, *words: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    command = [python, "-IS", str(archive), *words]
    return subprocess.run(command, env={"HOME": str(home)}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "agent.pyz"
    path.write_bytes(payload.pack(AGENT).data)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "a home"
    path.mkdir()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENTCTL_HOME", str(tmp_path / "agentctl"))
    folder = tmp_path / "agentctl/cache"
    folder.mkdir(parents=True)
    return folder


def build() -> payload.Payload:
    """As another process would."""
    return payload.build.__wrapped__()


def unpacked(home: Path) -> Path:
    (folder,) = (home / ".cache/agentctl").iterdir()
    return folder


def pythons() -> list[str]:
    """Those of this machine that the agent runs on: of the system, and other minor versions."""
    names = ["/usr/bin/python3", *(f"python3.{minor}" for minor in range(11, 16))]
    found = {os.path.realpath(path): path for name in names if (path := shutil.which(name))}
    enough = [sys.executable]
    for path in found.values():
        code = "import sys, ctypes, ssl; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([path, "-ISc", code], capture_output=True, timeout=60).returncode == 0:
            enough.append(path)
    return enough


def test_the_whole_agent_runs_on_every_python_without_any_package(tmp_path: Path, cache: Path) -> None:
    packed = build()
    path = tmp_path / "agent.pyz"
    path.write_bytes(packed.data)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "out")
        assert all(name.endswith(".py") for name in archive.namelist())
    modules = sorted(
        ".".join(source.relative_to(tmp_path / "out").with_suffix("").parts)
        for package in ("guest_agent", "protocol")
        for source in (tmp_path / "out" / package).rglob("*.py")
        if source.name not in ("__init__.py", "__main__.py")
    )
    assert "guest_agent.agent" in modules
    program = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path / "out")!r})
for module in {modules!r}:
    importlib.import_module(module)
from guest_agent import sockdiag
assert sockdiag._import_diag().DiagSocket
from protocol import build
print(build.digest())
print(sorted({{module.__file__ for name, module in sys.modules.items() if "site-packages" in str(module)}}))
"""
    for python in pythons():
        done = subprocess.run([python, "-ISc", program], capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines() == [digest(), "[]"], (python, done.stderr)


def test_equal_sources_make_equal_bytes_and_the_digest_is_theirs() -> None:
    packed = payload.pack(AGENT)
    assert packed == payload.pack(dict(reversed(AGENT.items())))
    assert packed.digest == hashlib.sha256(packed.data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(packed.data)) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_it_is_small_and_made_once(cache: Path) -> None:
    made = build()
    # It is sent over slow lines as well; tests and tools of the packages are not in it.
    assert len(made.data) < 1_500_000
    (kept,) = cache.iterdir()
    before = kept.stat().st_ino
    assert build() == made
    assert kept.stat().st_ino == before


@pytest.mark.parametrize("damage", ["empty", "half", "changed", "old", "no json", "more sources"])
def test_a_kept_one_that_is_not_what_would_be_made_is_made_again(
    cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"guest_agent/agent.py": Path(payload.__file__).parents[2] / "guest_agent/agent.py"}
    monkeypatch.setattr(payload, "_sources", lambda root: few)
    made = build()
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    head, _, data = content.partition(b"\n")
    said = json.loads(head)
    match damage:
        case "empty":
            content = b""
        case "half":
            content = content[: len(content) // 2]
        case "changed":
            content = content[:-1] + b"?"
        case "old":
            said["sources"][payload.__file__][1] -= 1
            content = json.dumps(said).encode() + b"\n" + data
        case "no json":
            content = b"[]\n" + data
        case "more sources":
            del said["sources"][payload.__file__]
            content = json.dumps(said).encode() + b"\n" + data
    kept.write_bytes(content)
    before = kept.stat().st_ino
    assert build() == made
    assert kept.stat().st_ino != before
    assert [path.name for path in cache.iterdir()] == [kept.name]


def test_nothing_is_kept_where_there_is_no_cache(cache: Path) -> None:
    cache.rmdir()
    build()
    assert not cache.exists()


def test_it_unpacks_itself_once_and_keeps_what_python_compiled(archive: Path, home: Path) -> None:
    done = launch(archive, home, "connect", "files")
    assert done.returncode == 7, done.stderr
    folder = unpacked(home)
    assert done.stdout == f"{folder / 'guest_agent/remote/__main__.py'} ['connect', 'files']\n"
    assert list(folder.rglob("*.pyc"))
    before = (folder / "guest_agent").stat().st_ino
    assert launch(archive, home, "check").returncode == 7
    assert (unpacked(home) / "guest_agent").stat().st_ino == before
    # What is unpacked runs as well, without the archive.
    archive.unlink()
    assert launch(folder, home).stdout == f"{folder / 'guest_agent/remote/__main__.py'} []\n"


def test_what_runs_is_held_and_was_used_now(archive: Path, home: Path) -> None:
    launch(archive, home)
    for program in (archive, unpacked(home)):
        for path in (archive, unpacked(home)):
            os.utime(path, (0, 0))
        command = [sys.executable, "-IS", str(program), "wait"]
        with subprocess.Popen(
            command, env={"HOME": str(home)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert b"wait" in child.stdout.readline()
            for path in {program, unpacked(home)}:
                assert path.stat().st_mtime > 0
                held = os.open(path, os.O_RDONLY)
                with pytest.raises(BlockingIOError):
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.close(held)
            child.communicate(b"\n", timeout=60)


def test_another_content_is_another_folder(archive: Path, home: Path) -> None:
    launch(archive, home)
    archive.write_bytes(payload.pack(AGENT | {"guest_agent/more.py": b""}).data)
    launch(archive, home)
    assert len(list((home / ".cache/agentctl").iterdir())) == 2


@pytest.mark.parametrize("damage", ["shorter", "changed", "gone"])
def test_a_check_finds_what_is_damaged_and_unpacks_again(archive: Path, home: Path, damage: str) -> None:
    launch(archive, home)
    entry = unpacked(home) / "guest_agent/remote/__main__.py"
    match damage:
        case "shorter":
            entry.write_bytes(b"")
        case "changed":
            entry.write_bytes(ENTRY.replace(b"7", b"8"))
        case "gone":
            entry.unlink()
    done = launch(archive, home, "check", "--nonce", "n")
    assert done.returncode == 7, done.stderr
    assert entry.read_bytes() == ENTRY
    assert [path.name for path in (home / ".cache/agentctl").iterdir()] == [unpacked(home).name]


def test_several_may_unpack_at_once(archive: Path, home: Path) -> None:
    command = [sys.executable, "-IS", str(archive), "check"]
    children = [
        subprocess.Popen(command, env={"HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    for child in children:
        _, err = child.communicate(timeout=60)
        assert child.returncode == 7, err
    assert (unpacked(home) / "guest_agent/remote/__main__.py").read_bytes() == ENTRY


def test_a_folder_that_cannot_be_made_is_a_sentence(archive: Path, home: Path) -> None:
    (home / ".cache").write_bytes(b"")
    done = launch(archive, home, "check", "--nonce", "abc")
    assert done.returncode == 4
    assert done.stdout.startswith("\nagentctl-failed abc {")
    assert re.fullmatch(
        rf"agentctl: .+ \({re.escape(str(home))}/.cache/agentctl/agent-[0-9a-f]{{16}}\)\n", done.stderr
    )
    done = launch(archive, home, "connect", "files")
    assert (done.returncode, done.stdout) == (4, "")


def test_an_old_python_says_so() -> None:
    """As far as a newer one can tell: nothing newer than 3.6 is in the launcher's syntax."""
    import ast

    from host_agent.remote import launcher

    source = Path(launcher.__file__).read_text()
    ast.parse(source, feature_version=(3, 7))
    assert "from __future__" not in source
