"""``KEY=VALUE``, as people type it."""

from __future__ import annotations

import pytest

from host_agent.configuration import text as config_text
from host_agent.configuration.change import applied, parse
from host_agent.configuration.keys import Host, InstanceConfig
from host_agent.errors import ExitCode, UserError

DEFAULT = InstanceConfig.default(Host(cpus=8, memory=1 << 34))
TEXT = """\
# mine
cpus: 2  # few
ports:
  lan: false
network:
  hosts:
    db.test: 192.0.2.7  # the database
"""


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (["cpus=3"], "cpus: 2  # few", "cpus: 3  # few"),
        (["cpus="], "cpus: 2  # few", "cpus: 4  # few"),
        (["ports.lan=true"], "lan: false", "lan: true"),
        (["network.hosts.db.test=192.0.2.8"], "192.0.2.7  #", "192.0.2.8  #"),
        (["network.hosts.db.test="], "  hosts:\n    db.test: 192.0.2.7  # the database\n", "  hosts: {}\n"),
        (["network.hosts.a.b=4"], "database\n", 'database\n    a.b: "4"\n'),
        (["network.dns=[192.0.2.53]"], "database\n", "database\n  dns:\n    - 192.0.2.53\n"),
        (["network.proxies=none"], "database\n", "database\n  proxies: none\n"),
        (["network.proxies.no_proxy=a,b"], "database\n", 'database\n  proxies:\n    no_proxy: "a,b"\n'),
        (["network.dns="], "", ""),
        (["network.proxies.http_proxy="], "", ""),
        (["cpus=3", "ports.lan=true", "cpus=5"], "2  # few\nports:\n  lan: false", "5  # few\nports:\n  lan: true"),
        (["ports.rules=[{guest_port: 80}]"], "lan: false\n", "lan: false\n  # R\n  rules:\n    - guest_port: 80\n"),
    ],
)  # fmt: skip
def test_it_is_changed_where_it_is(words: list[str], old: str, new: str) -> None:
    after = applied(TEXT, map(parse, words), DEFAULT)
    if "# R\n" in new:  # the comment of a key that was not there
        lines = after.splitlines(keepends=True)
        comments = [line for line in lines if line.startswith("  #")]
        after = "".join(line for line in lines if line not in comments[1:])
        after = after.replace(comments[0], "  # R\n")
    assert after == TEXT.replace(old, new)


def test_an_empty_file_gets_the_key_with_its_comment() -> None:
    text = applied("", [parse("memory=8GiB")], DEFAULT)
    assert text == "\n# Memory of the VM, like 4GiB or 512MiB.\nmemory: 8GiB\n"


@pytest.mark.parametrize(("word", "value"), [("a: b", {"a": "b"}), ("[~, /srv]", [None, "/srv"]), ("=", "=")])
def test_a_value_is_what_it_would_be_in_the_file(word: str, value: object) -> None:
    text = applied("", [parse(f"mounts={word}")], DEFAULT)
    assert config_text.parse(text).values == {"mounts": value}


@pytest.mark.parametrize(
    ("word", "said", "hint"),
    [
        ("cpus", "'cpus' is no KEY=VALUE", "cpus=2"),
        ("=2", "'=2' is no KEY=VALUE", "cpus=2"),
        ("cpu=2", "cpu is no key; did you mean cpus?", "config show"),
        ("lan=true", "lan is no key; did you mean ports.lan?", "config show"),
        ("ports.lam=true", "ports.lam is no key; did you mean lan?", "config show"),
        ("cpus.x=1", "cpus.x is no key; cpus has none in it", "config show"),
        ("network.proxies.http=x", "network.proxies.http is no key; did you mean", "config show"),
        ("ports=1", "ports is a group of keys", "set one of ports.lan, ports.privileged_offset, ports.rules"),
        ("mounts=[", "the value of mounts is not understood: this is not YAML", "quotes"),
        ("..=1", ".. is no key", "config show"),
    ],
)
def test_what_cannot_be(word: str, said: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(word)
    assert caught.value.message.startswith(said)
    assert hint in caught.value.hint
    assert caught.value.exit_code is ExitCode.USAGE
