from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

from protocol import build
from provision import bundle


def test_the_guest_agent_runs_from_its_drive(tmp_path: Path) -> None:
    content = bundle.build()
    assert len(content) % bundle.SECTOR == 0
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for info in archive:
            path = tmp_path / info.name
            path.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(info)
            assert source is not None
            path.write_bytes(source.read())
    # It is what it says in its hello, so that the host sees one build on both sides.
    assert build.digest_of(tmp_path) == build.digest()
    program = "import guest_agent.agent, protocol.link; print(protocol.link.__file__)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path))


def test_equal_sources_make_equal_bytes_and_only_sources_count(tmp_path: Path) -> None:
    for package in ("protocol", "fileserver", "guest_agent", "host_agent"):
        (tmp_path / package / "__pycache__").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("x = 1\n")
        (tmp_path / package / "__pycache__" / "x.pyc").touch()
    before = bundle.build(tmp_path)
    (tmp_path / "protocol/__init__.py").touch(mode=0o600)
    assert bundle.build(tmp_path) == before
    with tarfile.open(fileobj=io.BytesIO(before)) as archive:
        assert archive.getnames() == [
            "protocol/__init__.py",
            "fileserver/__init__.py",
            "guest_agent/__init__.py",
        ]
        assert {(info.mtime, info.uid, info.gid, info.mode) for info in archive} == {(0, 0, 0, 0o644)}
