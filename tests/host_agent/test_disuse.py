"""What nobody uses is told, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from host_agent import disuse, docker_context
from host_agent.errors import ExitCode
from host_agent.paths import Home
from provision import recipe
from provision.manifest import Manifest
from tests.host_agent.command_line import agentctl, said
from tests.host_agent.test_json_documents import examples, shape

CURRENT = recipe.load().digest
OLD, DAMAGED, RUNNING = "0" * 16, "1" * 16, "2" * 16


def make_image(home: Home, name: str, *, damaged: bool = False) -> Path:
    folder = home.images / name
    folder.mkdir()
    (folder / "root.img").write_bytes(b"x" * 10_000)
    if not damaged:
        manifest = Manifest(name, "trixie", "amd64", "6.12", [], 1_700_000_000, {}, {})
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return folder


def make_overlay(overlay: Path, base: Path) -> None:
    """The beginning of a qcow2 file, as qemu-img writes it."""
    name = os.fsencode(base)
    head = b"QFI\xfb" + (3).to_bytes(4, "big") + (512).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    overlay.parent.mkdir(parents=True, exist_ok=True)
    overlay.write_bytes(head.ljust(512, b"\0") + name)


@pytest.fixture
def full(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with images, of which one instance runs on an old one."""
    monkeypatch.setenv("PATH", str(home.root / "nothing"))
    for name in (CURRENT, OLD, RUNNING):
        make_image(home, name)
    make_image(home, DAMAGED, damaged=True)
    make_overlay(home.instance("dev").root_overlay, home.images / RUNNING / "root.img")
    home.instance("other").ensure()
    return home


def test_images_and_who_uses_them(full: Home) -> None:
    done = agentctl("image", "list", "--json")
    rows = json.loads(done.stdout)
    (running,) = (row for row in rows if row["used_by"])
    assert shape([running]) == shape(examples("image list")[0])
    listed = {row["image"]: row for row in rows}
    assert {name: (row["current"], row["used_by"], row["damaged"]) for name, row in listed.items()} == {
        CURRENT: (True, [], False),
        OLD: (False, [], False),
        DAMAGED: (False, [], True),
        RUNNING: (False, ["dev"], False),
    }
    assert all(row["size"] >= 10_000 for row in listed.values())
    lines = {line.split()[0]: line.rstrip() for line in agentctl("image", "list").stdout.splitlines()}
    assert lines[CURRENT].endswith("the next start")
    assert lines[RUNNING].endswith("instance dev")
    assert lines[OLD].endswith("nobody")
    assert "damaged" in lines[DAMAGED]


def test_what_is_used_stays(full: Home) -> None:
    (full.images / ".build-x").mkdir()
    (full.cache / "accelerators.json").write_text("{}")
    disk = full.instance("other").data_disk
    disk.write_bytes(b"precious")
    refused = agentctl("prune")
    assert refused.returncode == ExitCode.USAGE
    assert "say so with --yes" in refused.stderr
    assert (full.images / OLD).exists()
    assert agentctl("image", "prune", "--yes").returncode == 0
    assert {path.name for path in full.images.iterdir()} == {".lock", CURRENT, RUNNING}
    removed = json.loads(agentctl("prune", "--yes", "--json").stdout)
    assert shape(removed) == shape(examples("prune")[0]) == shape(examples("image prune")[0])
    assert [row["what"] for row in removed] == ["remembered trials of accelerators"]
    assert json.loads(agentctl("prune", "--json").stdout) == []
    assert "there is nothing to remove" in agentctl("prune").stderr
    assert disk.read_bytes() == b"precious"


def test_what_an_instance_is_configured_to_run_on_is_current(full: Home) -> None:
    podman = recipe.load(runtime="podman").digest
    make_image(full, podman)

    def current() -> set[str]:
        return {each.path.name for each in disuse.stored_images(full) if each.current}

    assert current() == {CURRENT}
    full.instance("other").config.write_text("runtime: podman\n")
    assert current() == {CURRENT, podman}
    full.instance("other").config.write_text("runtime: [")
    assert current() == {CURRENT, podman}, "who knows"
    full.instance("other").config.unlink()
    full.template.write_text("runtime: podman\n")
    assert current() == {CURRENT, podman}


def test_tools_that_the_machine_has_itself_go(full: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line and one plugin were installed since; the other plugin is ours alone."""
    path, plugins = full.root / "path", full.root.parent / "docker" / "cli-plugins"
    for program in (
        path / "docker",
        plugins / "docker-buildx",
        full.tools / "bin/docker",
        full.tools / "cli-plugins/docker-buildx",
        full.tools / "cli-plugins/docker-compose",
    ):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\necho Docker version 26\n")
        program.chmod(0o755)
    (plugins / "docker-compose").symlink_to(full.tools / "cli-plugins/docker-compose")
    monkeypatch.setattr(disuse.docker_tools, "SYSTEM_PLUGIN_DIRS", ())
    monkeypatch.setenv("PATH", f"{path}:{os.defpath}")
    for each in disuse.unused(full, os.environ):
        each.remove()
    assert [str(each.relative_to(full.tools)) for each in full.tools.rglob("docker*")] == [
        "cli-plugins/docker-compose"
    ]
    assert sorted(each.name for each in plugins.iterdir()) == ["docker-buildx", "docker-compose"]


def test_the_context_of_an_instance_that_is_gone_goes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home.root / "nothing"))
    contexts = docker_context.config_dir(os.environ)
    for name in ("default", "dev"):
        paths = home.instance(name)
        paths.ensure()
        docker_context.create(contexts, docker_context.context_name(name), paths.docker_socket)
    docker_context.create(contexts, "agentctl-elsewhere", Path("/elsewhere/instances/dev/docker.sock"))
    docker_context.create(contexts, "own", Path("/run/docker.sock"))
    broken = contexts / "contexts" / "meta" / "broken"
    broken.mkdir()
    (broken / "meta.json").write_text('{"Name": 7}')
    docker_context.activate(contexts, "agentctl-dev")
    assert disuse.unused(home, os.environ) == []
    shutil.rmtree(home.instance("dev").directory)
    (gone,) = disuse.unused(home, os.environ)
    assert gone.what == "docker context agentctl-dev, of an instance that is gone"
    gone.remove()
    assert disuse.unused(home, os.environ) == []
    assert docker_context.current(contexts) == ""
    assert set(docker_context.of_sockets_below(contexts, Path("/"))) == {
        "agentctl",
        "agentctl-elsewhere",
        "own",
    }


def test_the_file_below_an_overlay_is_what_qemu_says(tmp_path: Path) -> None:
    base = tmp_path / "a base"
    base.write_bytes(bytes(1 << 20))
    overlay = tmp_path / "overlay"
    assert disuse.backing_file(overlay) is None
    for content in (b"", b"QFI\xfb", b"no qcow2" * 100, b"QFI\xfb" + b"\xff" * 100):
        overlay.write_bytes(content)
        assert disuse.backing_file(overlay) is None
    make_overlay(overlay, base)
    assert disuse.backing_file(overlay) == base
    if (program := shutil.which("qemu-img")) is None:
        return
    command = [program, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(overlay)]
    overlay.unlink()
    subprocess.run(command, check=True, timeout=20)
    assert disuse.backing_file(overlay) == base


def test_an_image_that_is_there_is_not_built(full: Home) -> None:
    for name in ("kernel", "initrd"):
        (full.images / CURRENT / name).touch()
    told = json.loads(agentctl("image", "build", "--json").stdout)
    assert shape(told) == shape(examples("image build")[0])
    assert told == {"image": CURRENT, "path": str(full.images / CURRENT), "built": False}
    assert f"image {CURRENT} is there already" in agentctl("image", "build").stderr


def test_an_image_that_cannot_be_built_is_a_sentence(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home.root / "nothing"))
    done = agentctl("image", "build")
    assert said(done)[0].startswith("error: building the image needs mmdebstrap")
    assert done.returncode == ExitCode.RESOURCES


def test_nothing_is_asked_of_what_is_not_there(home: Home) -> None:
    assert "no image is built yet" in agentctl("image", "list").stdout
    assert json.loads(agentctl("image", "list", "--json").stdout) == []
    assert "there is nothing to remove" in agentctl("image", "prune").stderr
