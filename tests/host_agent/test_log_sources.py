from __future__ import annotations

import pytest

from host_agent import log_sources


def test_every_component_has_a_source() -> None:
    assert set(log_sources.COMPONENTS) == {*log_sources.FILES, *log_sources.UNITS, "system"}
    assert len(set(log_sources.COMPONENTS)) == len(log_sources.COMPONENTS)


def test_the_command_in_the_vm() -> None:
    assert log_sources.journal("system") == ["journalctl", "--no-pager", "--quiet"]
    assert log_sources.journal("guest", "docker")[3:] == [
        "--unit=agentctl-*",
        "--unit=docker",
        "--unit=containerd",
        "--unit=podman*",
    ]


@pytest.mark.parametrize(
    ("unit", "component"),
    [
        ("agentctl-agent.service", "guest"),
        ("docker.service", "docker"),
        ("containerd.service", "docker"),
        ("podman.service", "docker"),
    ],
)
def test_whose_unit_it_is(unit: str, component: str) -> None:
    assert log_sources.component_of(unit) == component
