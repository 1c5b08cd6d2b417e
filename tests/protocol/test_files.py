from __future__ import annotations

import dataclasses
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import codec, files
from protocol.api import Done
from protocol.errors import DecodeError
from protocol.files import ATTR, CALLS, DIRENT, FileCall

RESULTS = (
    files.Attributes, files.Entry, files.Content, files.Written, files.Position, files.Contents, files.Listing,
    files.FilesystemSize, files.Opened, files.LockState, files.Renamed, files.Removed, files.XattrNames,
)  # fmt: skip
MOUNTING = (files.Share, files.MountReport, files.MountReports, files.MountShares)
NOTICES = (files.NamesGone, files.Changed)

names = st.binary(min_size=1, max_size=files.MAX_NAME)
numbers = st.integers(0, 2**63 - 1)


def values(tp: Any) -> st.SearchStrategy[Any]:
    """Any legal value of a field."""
    plain = {int: numbers, bytes: names, bool: st.booleans(), str: st.text(max_size=20)}
    if tp in plain:
        return plain[tp]
    if typing.get_origin(tp) is list:
        return st.lists(values(typing.get_args(tp)[0]), max_size=5)
    if dataclasses.is_dataclass(tp) and isinstance(tp, type):
        return instances(tp)
    assert tp is files.MountStage
    return st.sampled_from(files.MountStage)


def instances(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{field.name: values(hints[field.name]) for field in dataclasses.fields(cls)})


@pytest.mark.parametrize(
    "cls", [*CALLS.values(), *RESULTS, *MOUNTING, *NOTICES], ids=lambda cls: cls.__name__
)
@given(data=st.data())
def test_every_message_comes_back(cls: type, data: st.DataObject) -> None:
    message = data.draw(instances(cls))
    packed = msgpack.packb(codec.encode(message), use_bin_type=True)
    assert codec.decode(cls, msgpack.unpackb(packed, raw=False)) == message


@given(shares=st.sets(st.integers(0, 2**32 - 1)))
def test_which_shares_are_in_use(shares: set[int]) -> None:
    assert files.shares_in_use(["files", files.in_use(shares), "in"]) == shares


@pytest.mark.parametrize("capabilities", [[], ["files", "in-use"], ["in-use=1,x"]])
def test_a_greeting_that_does_not_say_which_shares_are_in_use(capabilities: list[str]) -> None:
    assert files.shares_in_use(capabilities) is None


@given(uid=st.integers(0, files.MAX_ID), gid=st.integers(0, files.MAX_ID))
def test_who_uses_the_files(uid: int, gid: int) -> None:
    assert files.owner_of(["files", files.owner(uid, gid), "owner=1:2"]) == (uid, gid)


@pytest.mark.parametrize(
    "word",
    [
        "files",
        "owner=",
        "owner=1",
        "owner=1:",
        "owner=1:-1",
        "owner=1:4294967295",
        "owner=1:2:3",
        "owner=²:1",
    ],
)
def test_a_greeting_that_does_not_say_who_uses_the_files(word: str) -> None:
    assert files.owner_of([word]) is None


@pytest.mark.parametrize("cls", CALLS.values(), ids=lambda cls: cls.__name__)
def test_a_call_begins_with_share_unique_and_node(cls: type[FileCall[Any]]) -> None:
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    assert fields[:3] == ["share", "unique", "node"]
    assert cls.RESULT in (*RESULTS, Done)
    for short in range(3):
        with pytest.raises(DecodeError):
            codec.decode(cls, [1] * short)


def test_every_call_has_a_number_of_its_own() -> None:
    calls = [
        cls
        for cls in vars(files).values()
        if isinstance(cls, type) and issubclass(cls, FileCall) and cls is not FileCall
    ]
    assert len({cls.OP for cls in calls}) == len(calls)
    assert set(CALLS.values()) == set(calls)
    assert all(CALLS[cls.OP] is cls for cls in calls)


def test_what_changes_something() -> None:
    """What is asked twice after a crash must be known to be the same: a call missing here is done twice."""
    harmless = {cls.__name__ for cls in CALLS.values() if not cls.CHANGES}
    assert harmless == {
        "Lookup", "ReadLink", "List", "ListEntries", "GetAttributes", "GetXattr", "ListXattr", "GetFilesystemSize",
        "Read", "ReadMany", "Seek", "Sync", "TestLock",
    }  # fmt: skip


def test_the_layouts_are_the_kernels() -> None:
    assert (ATTR.size, DIRENT.size) == (88, 24)
    attr = ATTR.pack(1, 2, 3, 4, 5, 6, 7, 8, 9, 0o100644, 1, 1000, 1001, 0, 4096, 0)
    # struct fuse_attr: ino at 0, size at 8, ctime at 40, mode at 60, uid and gid at 68 and 72, blksize at 80.
    at = {offset: int.from_bytes(attr[offset : offset + size], "little") for offset, size in
          [(0, 8), (8, 8), (40, 8), (48, 4), (60, 4), (64, 4), (68, 4), (72, 4), (80, 4)]}  # fmt: skip
    assert at == {0: 1, 8: 2, 40: 6, 48: 7, 60: 0o100644, 64: 1, 68: 1000, 72: 1001, 80: 4096}
    assert DIRENT.pack(1, 2, 3, 4) == bytes([1, *[0] * 7, 2, *[0] * 7, 3, 0, 0, 0, 4, 0, 0, 0])


def test_a_listing_fits_into_a_frame() -> None:
    assert files.MAX_FILES_PAYLOAD >= files.MAX_DATA
    assert files.MAX_DATA == 256 * 4096
