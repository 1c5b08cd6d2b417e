"""A process that does all kinds of things below the current directory, and writes down what has returned.

    python3 worker.py INDEX LOGDIRECTORY

A line is written after the call has returned, outside of the mount. It ends, in order, when the file ``stop``
appears among the logs; any error ends it with a traceback.
"""

from __future__ import annotations

import os
import sys


def main(index: str, logs: str) -> None:
    os.makedirs(index)
    log = os.open(os.path.join(logs, index), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    appended = os.open("appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    written = os.open(f"{index}/written", os.O_WRONLY | os.O_CREAT, 0o644)
    os.close(os.open(f"{index}/renamed0", os.O_WRONLY | os.O_CREAT, 0o644))

    def done(text: str) -> None:
        os.write(log, f"{text}\n".encode())

    number = 0
    while not os.path.exists(os.path.join(logs, "stop")):
        os.write(appended, f"{index} {number}\n".encode())
        done(f"append {index} {number}")
        os.pwrite(written, b"%-15d\n" % number, number * 16)
        done(f"write {number}")
        name = f"created{number}"
        with open(f"{index}/{name}", "x") as file:
            file.write(f"{index} {name}" * 100)
        done(f"create {number}")
        os.rename(f"{index}/renamed{number}", f"{index}/renamed{number + 1}")
        done(f"rename {number}")
        os.mkdir(f"{index}/directory{number}")
        done(f"mkdir {number}")
        os.link(f"{index}/written", f"{index}/linked{number}")
        done(f"link {number}")
        if number % 2:
            os.unlink(f"{index}/created{number}")
            done(f"unlink {number}")
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
