from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from provision import initrd
from provision.errors import ProvisionError

# As depmod writes it: dependencies of dependencies are listed, nearest first.
MODULES_DEP = """\
kernel/block/virtio_blk.ko.xz: kernel/virtio/virtio_ring.ko.xz kernel/virtio/virtio.ko.xz
kernel/net/virtio_net.ko.xz: kernel/net/net_failover.ko.xz kernel/net/failover.ko.xz kernel/virtio/virtio.ko.xz
kernel/net/net_failover.ko.xz: kernel/net/failover.ko.xz
kernel/net/failover.ko.xz:
kernel/virtio/virtio-ring.ko.xz: kernel/virtio/virtio.ko.xz
kernel/virtio/virtio.ko.xz:
kernel/fs/unrelated.ko.xz:
"""


@dataclass(frozen=True)
class Member:
    mode: int
    uid: int
    links: int
    mtime: int
    device: tuple[int, int]
    content: bytes


def members(archive: bytes) -> Iterator[tuple[str, Member]]:
    """What is in a newc archive, read as the kernel does (init/initramfs.c)."""
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        head = archive[at + 6 : at + 110]
        _, mode, uid, _, links, mtime, size, _, _, major, minor, name_size, check = (
            int(head[n : n + 8], 16) for n in range(0, 104, 8)
        )
        assert check == 0
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) // 4 * 4
        at = (start + size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return
        yield (
            name[:-1].decode(),
            Member(mode, uid, links, mtime, (major, minor), archive[start : start + size]),
        )


def test_an_archive_is_what_was_put_in() -> None:
    archive = initrd.cpio(
        [
            initrd.directory("bin"),
            initrd.file("bin/x", b"12345", 0o755),
            initrd.Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            initrd.file("empty", b""),
        ]
    )
    assert dict(members(archive)) == {
        "bin": Member(stat.S_IFDIR | 0o755, 0, 1, 0, (0, 0), b""),
        "bin/x": Member(stat.S_IFREG | 0o755, 0, 1, 0, (0, 0), b"12345"),
        "dev/console": Member(stat.S_IFCHR | 0o600, 0, 1, 0, (5, 1), b""),
        "empty": Member(stat.S_IFREG | 0o644, 0, 1, 0, (0, 0), b""),
    }


def test_the_bytes_of_the_smallest_archive() -> None:
    zeros = b"00000000"
    assert initrd.cpio([]) == (
        b"070701"
        + b"00000001"
        + zeros * 3
        + b"00000001"
        + zeros * 6
        + b"0000000B"
        + zeros
        + b"TRAILER!!!\0\0\0\0"
    )


@pytest.mark.skipif(
    not (shutil.which("cpio") or shutil.which("bsdtar")), reason="neither cpio nor bsdtar here"
)
def test_others_can_read_it() -> None:
    command = ["cpio", "-t", "--quiet"] if shutil.which("cpio") else ["bsdtar", "-tf", "-"]
    archive = initrd.cpio([initrd.directory("bin"), initrd.file("bin/x", b"123")])
    done = subprocess.run(command, input=archive, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["bin", "bin/x"]


def test_dependencies_are_loaded_first_and_once() -> None:
    order = initrd.module_load_order(MODULES_DEP, ["virtio_blk", "virtio_net", "ext4"])
    assert [path.rpartition("/")[2] for path in order] == [
        "virtio.ko.xz",
        "virtio_ring.ko.xz",
        "virtio_blk.ko.xz",
        "failover.ko.xz",
        "net_failover.ko.xz",
        "virtio_net.ko.xz",
    ]


def test_a_module_is_found_by_its_name_however_its_file_is_spelt() -> None:
    assert initrd.module_load_order("kernel/crypto/aes-generic.ko:\n", ["aes_generic"]) == [
        "kernel/crypto/aes-generic.ko"
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root filesystem with a kernel's modules and busybox."""
    modules = tmp_path / "lib/modules/6.12"
    (modules / "kernel").mkdir(parents=True)
    (modules / "modules.dep").write_text("kernel/b.ko.xz: kernel/a.ko\nkernel/a.ko:\nkernel/c.ko.gz:\n")
    (modules / "modules.builtin").write_text("kernel/fs/ext4.ko\n")
    (modules / "kernel/a.ko").write_bytes(b"ELF a")
    (modules / "kernel/b.ko.xz").write_bytes(lzma.compress(b"ELF b"))
    (modules / "kernel/c.ko.gz").write_bytes(gzip.compress(b"ELF c"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").write_bytes(b"ELF busybox")
    return tmp_path


def test_an_initrd(root: Path) -> None:
    wanted = {"order": ["b", "ext4"], "beside": ["c"]}
    archive = initrd.build(root, "6.12", wanted, b"#!/bin/busybox sh\n")
    found = dict(members(archive))
    assert {name: member.content for name, member in found.items() if stat.S_ISREG(member.mode)} == {
        "bin/busybox": b"ELF busybox",
        "init": b"#!/bin/busybox sh\n",
        "modules/a.ko": b"ELF a",
        "modules/b.ko": b"ELF b",
        "modules/c.ko": b"ELF c",
        "modules/order": b"a.ko\nb.ko\n",
        "modules/beside": b"c.ko\n",
    }
    assert found["init"].mode & 0o111
    assert found["bin/busybox"].mode & 0o111
    names = list(found)
    assert names.index("modules") < names.index("modules/a.ko"), "the kernel makes no parents"
    again = {name: iter(modules) for name, modules in wanted.items()}
    assert archive == initrd.build(root, "6.12", again, b"#!/bin/busybox sh\n")


def test_what_two_lists_need_is_loaded_once_with_the_first(root: Path) -> None:
    wanted = {"alone": ["c"], "order": ["a"], "beside": ["b", "c"]}
    found = dict(members(initrd.build(root, "6.12", wanted, b"")))
    assert found["modules/alone"].content == b"c.ko\n"
    assert found["modules/order"].content == b"a.ko\n"
    assert found["modules/beside"].content == b"b.ko\n"


def test_a_module_that_the_kernel_does_not_have_is_named(root: Path) -> None:
    with pytest.raises(ProvisionError, match=r"kernel 6\.12 has no module virtio_blk, zfs"):
        initrd.build(root, "6.12", {"order": ["a", "virtio_blk", "ext4"], "beside": ["zfs"]}, b"")


def test_a_compression_nobody_knows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.ko.zst"
    path.touch()
    with pytest.raises(ProvisionError, match=r"cannot read x\.ko\.zst"):
        initrd.decompressed(path)
