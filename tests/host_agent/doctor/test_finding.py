from __future__ import annotations

from host_agent.doctor.finding import Diagnosis, Finding, Level, advice, of_error, ok, problem
from host_agent.errors import ExitCode, UserError
from provision.errors import ProvisionError


def test_the_first_problem_decides() -> None:
    well, could_be, wrong = ok("a", "fine"), advice("b", "slow", "do"), problem("c", "no", "do")
    assert Diagnosis.of([]).exit_code == 0
    assert Diagnosis.of([well, could_be]).exit_code == 0
    later = problem("d", "no", code=ExitCode.DOCKER)
    diagnosis = Diagnosis.of(iter([well, could_be, later, wrong]))
    assert diagnosis.exit_code == ExitCode.DOCKER
    assert [diagnosis.count(level) for level in Level] == [1, 1, 2]


def test_an_error_of_up_is_a_problem() -> None:
    refused = UserError("QEMU is missing.", "Install it.", ExitCode.DEPENDENCY)
    assert of_error("qemu", refused) == Finding("qemu", Level.PROBLEM, "QEMU is missing", "Install it", 3)
    assert of_error("image", ProvisionError("no mmdebstrap", "get it")).exit_code == ExitCode.DEPENDENCY
