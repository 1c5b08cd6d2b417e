"""How the command line ends: by whichever signal, and in the background of a script, too."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import signal, sys, trio
background = sys.argv[1] == "background"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
from host_agent import __main__, cli
async def follow():
    print("ready", flush=True)
    await trio.sleep_forever()
def main():
    try:
        trio.run(follow)
    except KeyboardInterrupt:
        print("ended", flush=True)
        sys.exit(130)
cli.main = main
__main__.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("where", ["foreground", "background"])
def test_a_signal_ends_it_in_good_order(where: str, number: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMMAND, where]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        if (where, number) == ("background", signal.SIGINT):
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(0.5)
            running.terminate()
        try:
            assert running.wait(30) == 130
        finally:
            running.kill()
        assert running.stdout.read() == "ended\n"
