"""What of the store of images may go, and how it goes."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from provision import store
from provision.errors import ProvisionError

OLD, NEW = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in (OLD, NEW, ".build-0123456789abcdef", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "root.img").write_bytes(b"x" * 1000)
    (tmp_path / "failed-build.log").write_text("no")
    return tmp_path


def test_images_and_leftovers_are_told_apart(images: Path, tmp_path: Path) -> None:
    assert [path.name for path in store.stored(images)] == [OLD, NEW]
    assert [path.name for path in store.leftovers(images)] == [".build-0123456789abcdef", "failed-build.log"]
    assert store.stored(tmp_path / "nowhere") == store.leftovers(tmp_path / "nowhere") == []


def test_what_is_named_goes_and_nothing_else(images: Path) -> None:
    store.remove(images, images / OLD)
    for path in store.leftovers(images):
        store.remove(images, path)
    store.remove(images, images / OLD)
    assert sorted(path.name for path in images.iterdir()) == [".lock", NEW, "mine"]


def test_nothing_goes_while_something_is_built(images: Path) -> None:
    with (images / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert store.leftovers(images) == []
        with pytest.raises(ProvisionError, match="an image is just being built"):
            store.remove(images, images / OLD)
    assert (images / OLD / "root.img").exists()


def test_an_image_is_whole_until_it_is_gone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.remove(images, images / OLD)
    assert [path.name for path in store.stored(images)] == [NEW]
    assert images / f".build-{OLD}-removed" in store.leftovers(images)
