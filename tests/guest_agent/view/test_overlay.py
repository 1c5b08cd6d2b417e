from __future__ import annotations

import os
from pathlib import Path

import pytest

from guest_agent.view.overlay import Overlay
from guest_agent.view.places import MALFORMED

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts overlays")


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    for name in ("upper", "middle", "lower"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / name).write_text(name)
        (tmp_path / name / "same").write_text(name)
    return [str(tmp_path / name) for name in ("upper", "middle", "lower")]


def opened(layers: list[str]) -> Overlay:
    made = Overlay(layers)
    try:
        os.close(made.open())
    except OSError as error:
        pytest.skip(f"this kernel has no overlays whose layers are told one by one: {error}")
    return made


def test_the_uppermost_is_seen_and_nothing_is_mounted_anywhere(layers: list[str]) -> None:
    overlay = opened(layers)
    root = overlay.open()
    assert sorted(os.listdir(f"/proc/self/fd/{root}/sub")) == ["lower", "middle", "upper"]
    assert Path(f"/proc/self/fd/{root}/same").read_text() == "upper"
    with pytest.raises(OSError, match="Read-only"):
        Path(f"/proc/self/fd/{root}/same").write_text("changed")
    assert " overlay agentctl-view " not in Path("/proc/self/mountinfo").read_text()
    overlay.close()
    assert Path(f"/proc/self/fd/{root}/same").read_text() == "upper"  # who has it, has it
    os.close(root)


def test_one_that_is_closed_is_not_opened_again(layers: list[str]) -> None:
    overlay = opened(layers)
    overlay.close()
    with pytest.raises(FileNotFoundError):
        overlay.open()


def test_a_layer_that_is_gone_is_an_error(layers: list[str]) -> None:
    opened(layers).close()
    with pytest.raises(OSError) as failed:
        Overlay([*layers, "/nothing/here"]).open()
    assert not isinstance(failed.value, MALFORMED)
