from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.bench import ssh
from tests.bench.machine import Devices, with_devices
from tests.bench.ports import peers
from tests.bench.ports.measurements import Peer
from tests.bench.ports.peers import SSH, PeerFailed, Ports
from tests.free_ports import free_port


def test_qemu_is_told_of_the_two_ports_that_lead_into_the_guest() -> None:
    devices = Devices("qemu", Ports(server=8000, sshd=2222, hostfwd=8001).of_qemu)
    [_, network] = with_devices(["-netdev", "user,id=net"], devices)
    assert network == "user,id=net,hostfwd=tcp:127.0.0.1:2222-:2022,hostfwd=tcp:127.0.0.1:8001-:8000"


def test_ssh_forwards_from_localhost_to_localhost() -> None:
    command = ssh.forwarding(Path("/key"), 2222, listen=5000, target=8000, user="me")
    assert command[command.index("-L") + 1] == "127.0.0.1:5000:127.0.0.1:8000"
    assert command[command.index("-p") + 1] == "2222"
    assert command[-1] == "me@127.0.0.1"
    assert "-N" in command


def test_what_a_peer_needs_is_asked_for_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "openssh-client" in peers.obstacle(SSH, vm=True)
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == "sshd" else f"/bin/{name}")
    assert peers.obstacle(SSH, vm=True) == ""
    assert "openssh-server" in peers.obstacle(SSH, vm=False)
    assert [peers.obstacle(name, vm=False) for name in peers.LOCAL_PEERS if name != SSH] == ["", ""]


def test_who_cannot_be_had_is_left_out_and_the_reason_kept() -> None:
    def offer(name: str) -> Peer:
        if name == "broken":
            raise PeerFailed("it does not answer")
        return Peer(name, 1)

    assert peers.offered(offer, ["a", "broken", "b"], vm=True) == (
        [Peer("a", 1), Peer("b", 1)],
        {"broken": "it does not answer"},
    )


def test_a_peer_that_never_answers_is_not_waited_for_for_ever() -> None:
    with pytest.raises(PeerFailed, match="does not answer"):
        peers.wait_for(Peer("nobody", free_port()), timeout=0.0)
