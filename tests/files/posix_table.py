"""A table of POSIX operations and what comes of them, in the directory given, as JSON on stdout;
each row is named on stderr as it begins.

    python3 posix_table.py DIRECTORY [--names COUNT] [--only TEXT] [--every NTH] [--seconds LIMIT]

Only the standard library, so that it runs anywhere: on the mount, on the filesystem below it, and in the
guest. Two runs on filesystems that behave alike say the same, row by row. ``--names``: how many entries
the very large directory has (100,000). ``--every``: only every so many rows. ``--seconds``: a row that has not ended by then is reported as such (60).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

from rows import attributes, data, directories, locking, naming, opening, processes, table

_ = (attributes, data, locking, naming, opening, processes)


def ran_out(*_: object) -> None:
    raise TimeoutError


def outcome(function: table.Row, seconds: int) -> Any:
    signal.alarm(seconds)
    try:
        return function()
    except TimeoutError:
        return f"not over within {seconds} s"
    except OSError as error:
        return table.name_of(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def run_row(top: str, number: int, function: table.Row, seconds: int) -> Any:
    place = os.path.join(top, f"row{number}")
    os.mkdir(place)
    os.chdir(place)
    try:
        return json.loads(json.dumps(outcome(function, seconds)))
    finally:
        os.umask(0o22)
        os.chdir(top)
        with contextlib.suppress(OSError):
            shutil.rmtree(place)


def main(arguments: list[str]) -> int:
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    count = int(options.pop("--names", "100000"))
    only = options.pop("--only", "")
    every = int(options.pop("--every", "1"))
    seconds = int(options.pop("--seconds", "60"))
    if options:
        print(__doc__, file=sys.stderr)
        return 2
    table.add(f"a directory of {count} names", lambda: directories.a_very_large_directory(count))
    signal.signal(signal.SIGALRM, ran_out)
    os.umask(0o22)
    top = tempfile.mkdtemp(prefix="posix-", dir=arguments[0])
    os.chmod(top, 0o755)
    outcomes = {}
    for number, (name, function) in enumerate(table.ROWS.items()):
        if only in name and number % every == 0:
            print(f"{time.monotonic():.3f} {name}", file=sys.stderr, flush=True)
            outcomes[name] = run_row(top, number, function, seconds)
    os.chdir("/")
    shutil.rmtree(top, ignore_errors=True)
    json.dump(outcomes, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
