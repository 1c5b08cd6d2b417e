from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.errors import UserError
from host_agent.mount_entries import InvalidMount, as_plain, from_plain
from protocol.api import MountSpec


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        (None, MountSpec("/home/me", "/home/me")),
        ("~", MountSpec("/home/me", "/home/me")),
        ("~/src/", MountSpec("/home/me/src", "/home/me/src")),
        ("/srv//a:/b:ro,locks=host", MountSpec("/srv/a", "/b", True, True)),
        ({"host_path": None}, MountSpec("/home/me", "/home/me")),
        ({"host_path": "~/a:b", "guest_path": "/c"}, MountSpec("/home/me/a:b", "/c")),
        ({"host_path": "/a", "read_only": True, "host_locks": True}, MountSpec("/a", "/a", True, True)),
    ],
)
def test_words_and_mappings(value: Any, spec: MountSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert from_plain(value) == spec
    assert from_plain(as_plain(spec)) == spec


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1, "it is the path of a folder, or a mapping with host_path"),
        ({}, "it has no host_path"),
        ({"host_path": "src"}, 'host_path is "src"; it is a path that begins with / or ~/'),
        ("src", 'host_path is "src"'),
        ({"host_path": "/a", "guest_path": "~/a"}, 'guest_path is "~/a"; it is a path that begins with /'),
        ({"host_path": "/a", "readOnly": True}, "readOnly is no key of a mount; did you mean read_only?"),
        ({"host_path": "/a", "read_only": "yes"}, 'read_only is "yes"; it is true or false'),
        ("/a:b", "is neither a place in the VM"),
    ],
)
def test_what_cannot_be(value: Any, said: str) -> None:
    with pytest.raises((InvalidMount, UserError), match=".*") as caught:
        from_plain(value)
    assert said in str(caught.value)


@given(
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), st.booleans(), st.booleans()
)
def test_what_is_written_is_understood_as_the_same(name: str, read_only: bool, host_locks: bool) -> None:
    path = "/srv/" + name.replace("/", "_").replace(".", "_")
    for spec in (MountSpec(path, path, read_only, host_locks), MountSpec(path, "/b", read_only, host_locks)):
        assert from_plain(as_plain(spec)) == spec
