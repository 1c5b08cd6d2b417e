from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from host_agent import show_json
from protocol.api import MountState
from tests.host_agent.stand_in import STATUS


def test_one_document_that_ends_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_json.as_json([{"state": MountState.MOUNTED, "size": 1}])
    assert capsys.readouterr().out == '[\n  {\n    "state": "mounted",\n    "size": 1\n  }\n]\n'


def test_a_status_has_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    show_json.status_json(STATUS)
    assert json.loads(capsys.readouterr().out) == asdict(STATUS)
