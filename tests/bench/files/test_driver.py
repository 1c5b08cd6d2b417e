from __future__ import annotations

import subprocess
import sys

from tests.bench import processes
from tests.bench.files.driver import Answer, Driver
from tests.bench.files.workloads import Request

REQUEST = Request("stat", "/c", "/o", "/g", drop=False, warm_up=False)

ANSWERS = """
import json, sys, time
print(json.dumps({"kernel": "K"}), flush=True)
for line in sys.stdin:
    workload = json.loads(line)["workload"]
    if workload == "hang":
        time.sleep(1000)
    if workload == "die":
        sys.exit(3)
    if workload == "fail":
        print(json.dumps({"error": "it failed"}), flush=True)
    else:
        print(json.dumps({"seconds": 0.5, "count": 4}), flush=True)
"""


class Started:
    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-u", "-c", ANSWERS]
        self.processes.append(processes.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return self.processes[-1]


def test_a_driver_answers_and_says_where_it_is() -> None:
    started = Started()
    with Driver(started) as one:
        assert one.environment == {"kernel": "K"}
        assert one.ask(REQUEST, 20) == Answer(0.5, 4)
        assert one.ask(Request("fail", "", "", "", False, False), 20) == Answer(error="it failed")
        assert one.ask(REQUEST, 20) == Answer(0.5, 4)
    assert [process.poll() is not None for process in started.processes] == [True]


def test_a_driver_that_hangs_is_given_up_and_replaced() -> None:
    started = Started()
    with Driver(started) as one:
        answer = one.ask(Request("hang", "", "", "", False, False), 0.05)
        assert "no answer" in answer.error
        assert one.ask(REQUEST, 20) == Answer(0.5, 4)
    assert [process.poll() is not None for process in started.processes] == [True, True]


def test_a_driver_that_dies_is_replaced() -> None:
    started = Started()
    with Driver(started) as one:
        assert "ended" in one.ask(Request("die", "", "", "", False, False), 20).error
        assert one.ask(REQUEST, 20) == Answer(0.5, 4)
    assert len(started.processes) == 2
