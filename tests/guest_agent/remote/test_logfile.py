from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.guest_agent.remote.conftest import REPOSITORY

PROGRAM = """
import logging, os, sys
from pathlib import Path
from guest_agent.remote import logfile
logfile.MAX_LOG = 1000
logging.basicConfig(level=logging.INFO, handlers=[logfile.StderrLog(Path(sys.argv[1]))])
for number in range(200):
    logging.info("line %d", number)
os.write(2, b"what Python says\\n")
"""


def test_a_log_is_bounded_and_its_last_words_are_there(tmp_path: Path) -> None:
    path = tmp_path / "control.log"
    with path.open("ab") as log:
        command = [sys.executable, "-c", PROGRAM, str(path)]
        subprocess.run(command, check=True, stderr=log, cwd=REPOSITORY, timeout=60)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["control.log", "control.log.1"]
    assert all(file.stat().st_size < 1100 for file in tmp_path.iterdir())
    assert path.read_text().endswith("line 199\nwhat Python says\n")
