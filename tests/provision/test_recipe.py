from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from provision import recipe
from provision.errors import ProvisionError


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(recipe.HERE / "recipe.toml", tmp_path)
    shutil.copytree(recipe.HERE / "guest", tmp_path / "guest")
    return tmp_path


def some_file(copy: Path) -> Path:
    return next(path for path in sorted((copy / "guest").rglob("*")) if path.is_file())


def edit(copy: Path) -> None:
    path = some_file(copy)
    path.write_bytes(path.read_bytes() + b"\n")


def flip_executable(copy: Path) -> None:
    path = some_file(copy)
    path.chmod(path.stat().st_mode ^ 0o100)


def rename(copy: Path) -> None:
    path = some_file(copy)
    path.rename(path.with_name(path.name + "x"))


def add(copy: Path) -> None:
    (copy / "guest/etc").mkdir(exist_ok=True)
    (copy / "guest/etc/new").touch()


def comment(copy: Path) -> None:
    path = copy / "recipe.toml"
    path.write_text(path.read_text() + "# more\n")


def test_the_recipe_is_one() -> None:
    loaded = recipe.load(machine="x86_64")
    assert loaded.architecture == "amd64"
    assert loaded.kernel_package == "linux-image-cloud-amd64"
    assert "docker.io" in loaded.packages
    assert set(loaded.bulk_modules) == {"nd_e820", "nd_pmem"}
    assert len(loaded.digest) == 16
    assert (loaded.guest_files / "usr/lib/agentctl/init").is_file()


def test_each_runtime_has_an_image_of_its_own() -> None:
    docker, podman, containerd = (
        recipe.load(machine="x86_64", runtime=runtime) for runtime in recipe.RUNTIMES
    )
    assert docker == recipe.load(machine="x86_64")
    assert len({docker.digest, podman.digest, containerd.digest}) == 3
    assert {"docker.io", "podman"}.isdisjoint(containerd.packages)
    assert ("docker.io" in podman.packages, "podman" in docker.packages) == (False, False)
    assert {"podman", "docker-cli"} <= set(podman.packages)
    with pytest.raises(ProvisionError):
        recipe.load(machine="x86_64", runtime="rkt")


def test_equal_recipes_have_equal_names_wherever_they_are(copy: Path) -> None:
    assert recipe.load(copy, "x86_64").digest == recipe.load(machine="x86_64").digest


@pytest.mark.parametrize("change", [edit, flip_executable, rename, add, comment])
def test_whatever_could_make_another_image_makes_another_name(
    copy: Path, change: Callable[[Path], None]
) -> None:
    before = recipe.load(copy, "x86_64").digest
    change(copy)
    assert recipe.load(copy, "x86_64").digest != before


def test_what_a_checkout_does_not_keep_makes_no_difference(copy: Path) -> None:
    before = recipe.load(copy, "x86_64").digest
    path = some_file(copy)
    path.chmod(path.stat().st_mode ^ 0o044)
    assert recipe.load(copy, "x86_64").digest == before


def test_architectures_have_names_of_their_own() -> None:
    assert recipe.load(machine="aarch64").digest != recipe.load(machine="x86_64").digest
    assert recipe.load(machine="arm64").digest == recipe.load(machine="aarch64").digest
    with pytest.raises(ProvisionError, match="there is no guest image for riscv64 machines"):
        recipe.load(machine="riscv64")


@pytest.mark.parametrize("text", ["suite = ", "suite = 5", "\x00", ""])
def test_what_is_no_recipe_is_said(copy: Path, text: str) -> None:
    (copy / "recipe.toml").write_text(text)
    with pytest.raises(ProvisionError, match=r"recipe\.toml is not a recipe") as caught:
        recipe.load(copy, "x86_64")
    assert caught.value.hint == "reinstall agentctl"


def test_a_missing_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match=r"cannot read .*: No such file"):
        recipe.load(tmp_path, "x86_64")
