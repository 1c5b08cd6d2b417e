"""What a container may be given: never a silently empty folder."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Instance

pytestmark = pytest.mark.vm


@pytest.fixture
def unshared() -> Iterator[Path]:
    """A folder of the host that the VM does not see, with a file in it."""
    folder = Path(tempfile.mkdtemp(prefix="agentctl-e2e-", dir="/var/tmp"))
    (folder / "precious").touch()
    yield folder
    shutil.rmtree(folder)


def complaint(vm: Instance, *arguments: str) -> str:
    """What the docker CLI says of a command that fails."""
    with pytest.raises(AssertionError) as failed:
        vm.docker(*arguments)
    return str(failed.value)


def bind(source: Path | str) -> tuple[str, str]:
    return "--mount", f"type=bind,src={source},dst=/x"


@pytest.mark.parametrize("way", ["-v", "--mount"])
def test_a_folder_that_is_not_shared_is_refused_by_name(
    vm: Instance, image: str, unshared: Path, way: str
) -> None:
    options = ("-v", f"{unshared}:/x") if way == "-v" else bind(unshared)
    said = complaint(vm, "run", "--rm", *options, image, "/bin/busybox", "ls", "/x")
    assert f"mounts denied: {unshared} is not shared with the VM" in said
    assert f"cd {unshared} && agentctl up" in said
    assert vm.guest(f"test -e {unshared} || echo absent") == "absent\n", "nothing was made in its place"


def test_a_volume_of_a_folder_that_is_not_shared_is_refused(vm: Instance, unshared: Path) -> None:
    options = ("-o", "type=none", "-o", "o=bind", "-o", f"device={unshared}")
    assert f"mounts denied: {unshared}" in complaint(vm, "volume", "create", *options, "refused")
    assert "refused" not in vm.docker("volume", "ls", "-q").split()


def test_compose_shows_the_refusal(vm: Instance, image: str, unshared: Path, tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(f"services:\n  one:\n    image: {image}\n    volumes: ['{unshared}:/x']\n")
    compose = ("compose", "-p", "refused", "-f", str(file))
    try:
        assert f"mounts denied: {unshared} is not shared" in complaint(vm, *compose, "up", "-d")
    finally:
        vm.docker(*compose, "down")


def test_a_link_out_of_the_home_is_refused_with_both_names(
    vm: Instance, image: str, project: Path, unshared: Path
) -> None:
    (project / "link").symlink_to(unshared)
    said = complaint(vm, "run", "--rm", "-v", f"{project}/link:/x", image, "/bin/busybox", "ls", "/x")
    assert f"mounts denied: {project}/link leads to {unshared}" in said


def test_a_folder_that_is_made_by_docker_is_on_the_host(vm: Instance, image: str, project: Path) -> None:
    made = project / "not" / "yet"
    vm.docker("run", "--rm", "-v", f"{made}:/x", image, "/bin/busybox", "touch", "/x/file")
    assert (made / "file").exists()


def test_a_folder_is_fine_once_it_is_shared(vm: Instance, image: str, unshared: Path) -> None:
    assert "mounts denied" in complaint(vm, "create", "-v", f"{unshared}:/x", image)
    vm.agentctl("up", cwd=str(unshared))
    listed = vm.docker("run", "--rm", "-v", f"{unshared}:/x", image, "/bin/busybox", "ls", "/x")
    assert listed == "precious"


def test_docker_in_a_container_gets_the_vms_own_socket(vm: Instance, image: str) -> None:
    socket = "/var/run/docker.sock"
    test = ("/bin/busybox", "test", "-S", socket)
    vm.docker("run", "--rm", "-v", f"{socket}:{socket}", image, *test)
    said = complaint(vm, "run", "--rm", "-v", f"{vm.directory}/docker.sock:{socket}", image, *test)
    assert f"in the VM it is {socket}" in said


@pytest.mark.parametrize(
    "source", ["/", "/lib/modules", "/etc/localtime", "/var/lib/docker", "/usr/bin/docker"]
)
def test_what_the_vm_has_of_itself_is_there(vm: Instance, image: str, source: str) -> None:
    vm.docker("run", "--rm", *bind(source), image, "/bin/busybox", "test", "-e", "/x")


def test_the_list_of_the_vms_own_places_is_true(vm: Instance) -> None:
    """A place that is not in the guest's image would be made there, as an empty folder."""
    from host_agent.bind_sources import OWN_PLACES, OWN_TREES

    places = " ".join(sorted(OWN_PLACES | set(OWN_TREES) - {"/cgroup"}))
    assert vm.guest(f"for place in {places}; do test -e $place || echo $place; done") == ""


def test_a_refusal_leaves_other_connections_alone(vm: Instance, image: str, unshared: Path) -> None:
    """Refused and allowed containers side by side, each by a docker CLI of its own."""
    tools = vm.home / "tools" / "bin"
    environment = {**vm.environment, "PATH": f"{vm.environment['PATH']}:{tools}"}
    runs = [
        subprocess.Popen(
            ["docker", "run", "--rm", *options, image, "/bin/busybox", "true"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for options in [("-v", f"{unshared}:/x"), ()] * 4
    ]
    assert [run.wait(300) for run in runs] == [125, 0] * 4
