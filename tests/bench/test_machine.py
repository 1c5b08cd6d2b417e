from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.machine import Devices, is_machine, with_devices

ARGUMENTS = ["-m", "2048M", "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]
DEVICES = Devices("/usr/bin/qemu", ((2222, 22),), ("/usr/lib/qemu/virtiofsd",), "/tmp/a,b.sock", "/tmp/log")


def test_the_guest_gets_shared_memory_and_a_filesystem_device() -> None:
    found = with_devices(ARGUMENTS, DEVICES)
    assert "memory-backend-memfd,id=bench-memory,size=2048M,share=on" in found
    assert "socket,id=bench-virtiofs,path=/tmp/a,,b.sock" in found
    assert found[found.index("-netdev") + 1] == "user,id=net,hostfwd=tcp:127.0.0.1:2222-:22"


def test_room_for_a_memory_device_is_left_as_it_is() -> None:
    found = with_devices(["-m", "size=2048M,maxmem=2112M", *ARGUMENTS[2:]], DEVICES)
    assert "memory-backend-memfd,id=bench-memory,size=2048M,share=on" in found
    assert found[1] == "size=2048M,maxmem=2112M"


def test_without_virtiofs_only_ports_are_added() -> None:
    found = with_devices(ARGUMENTS, Devices("/usr/bin/qemu", ((2222, 22), (8080, 80))))
    network = "user,id=net,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=tcp:127.0.0.1:8080-:80"
    assert found == [*ARGUMENTS[:3], network, *ARGUMENTS[4:]]


def test_the_given_arguments_are_not_changed() -> None:
    before = list(ARGUMENTS)
    with_devices(ARGUMENTS, DEVICES)
    assert before == ARGUMENTS


def test_a_size_of_memory_that_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="2G"):
        with_devices(["-m", "2G", *ARGUMENTS[2:]], DEVICES)


def test_a_probe_or_a_question_passes_through() -> None:
    assert is_machine(ARGUMENTS)
    assert not is_machine(["--version"])
    assert not is_machine(["-m", "256M", "-kernel", "kernel"])


def test_the_configuration_survives_its_file(tmp_path: Path) -> None:
    DEVICES.write(tmp_path / "devices.json")
    assert Devices.read(tmp_path / "devices.json") == DEVICES
