"""What ``up`` starts with, where other commands change what is configured; nothing is started."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from host_agent import forwards_at_rest, starting, up
from host_agent.configuration import config
from host_agent.configuration.config import Host, Wishes
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import ChangePorts, ChangeSocketForwards, PortRule, SocketForward

RULE = PortRule(guest_port=80, ports=1, host_port=8080)
SOCKET = SocketForward("/run/g.sock", "/tmp/h.sock")


def forward_add(paths: InstancePaths) -> None:
    """As ``agentctl forward add`` does it in an instance that does not run."""
    forwards_at_rest.change(paths, ChangePorts(add=[RULE]), ChangeSocketForwards(add=[SOCKET]))


@pytest.fixture
def at_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """``up`` to the point where it would start the VM."""

    def spawn(*arguments: object, **options: object) -> None:
        raise UserError("so far", "", ExitCode.BUSY)

    async def no_tools(*arguments: object) -> tuple[str, ...]:
        return ()

    manifest = SimpleNamespace(digest="0", suite="trixie")
    monkeypatch.setattr(up, "find_qemu", lambda: None)
    monkeypatch.setattr(up.images, "ensure", lambda *arguments: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(up, "_docker_tools", no_tools)
    monkeypatch.setattr(starting.keeper, "spawn", spawn)


def before_the_lock(change: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def running(*arguments: object) -> None:
        change()

    monkeypatch.setattr(starting, "running", running)


def while_the_image_is_built(change: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    ready = up.images.ensure

    def ensure(*arguments: object) -> object:
        change()
        return ready(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(up.images, "ensure", ensure)


@pytest.mark.usefixtures("at_spawn")
@pytest.mark.parametrize("when", [before_the_lock, while_the_image_is_built])
def test_a_forward_that_is_added_meanwhile_is_not_lost(
    home: Home,
    instance: InstancePaths,
    when: Callable[[Callable[[], None], pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    when(lambda: forward_add(instance), monkeypatch)
    with pytest.raises(UserError, match="so far"):
        up.run(home, instance, Wishes(cpus=1, lan=True), lambda line: None)
    kept = config.load(instance, Host.measure())
    assert (kept.rules, kept.sockets) == ((RULE,), (SOCKET,))
    assert (kept.cpus, kept.lan) == (1, True)
