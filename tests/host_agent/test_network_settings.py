from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.network_settings import (
    KEYS,
    InvalidSetting,
    Nameserver,
    NetworkSettings,
    as_json,
    from_json,
    in_full,
)


def test_without_a_word_the_vm_has_what_the_host_has() -> None:
    assert from_json({}) == NetworkSettings()
    assert NetworkSettings().certificates == ("host",)
    assert as_json(NetworkSettings()) == {}


def test_all_keys() -> None:
    settings = from_json(
        {
            "dns": ["192.0.2.53", "127.0.0.1:5353", "2001:DB8::1", "[::1]:54", "192.0.2.53"],
            "hosts": {"DB.test.": "192.0.2.7", "api.test": "host.docker.internal", "six.test": "2001:db8::7"},
            "proxies": {"https_proxy": "http://proxy.example:3128", "no_proxy": "a,b"},
            "ca_certificates": ["host", "~/corp.pem", "/srv/ca"],
        }
    )
    assert settings.nameservers == (
        Nameserver("192.0.2.53"),
        Nameserver("127.0.0.1", 5353),
        Nameserver("2001:db8::1"),
        Nameserver("::1", 54),
    )
    assert settings.hosts == (
        ("db.test", "192.0.2.7"),
        ("api.test", "host.docker.internal"),
        ("six.test", "2001:db8::7"),
    )
    assert settings.proxies == (("https_proxy", "http://proxy.example:3128"), ("no_proxy", "a,b"))
    assert settings.certificates == ("host", "~/corp.pem", "/srv/ca")
    assert from_json(as_json(settings)) == settings
    assert as_json(settings)["dns"] == ["192.0.2.53", "127.0.0.1:5353", "2001:db8::1", "[::1]:54"]


@pytest.mark.parametrize("off", [{"proxies": "none"}, {"ca_certificates": []}])
def test_what_is_turned_off(off: dict[str, Any]) -> None:
    assert as_json(from_json(off)) == off


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        ([], "network", "is a mapping"),
        ({"Host": {}}, "Host", "did you mean hosts?"),
        ({"quux": 1}, "quux", "its keys are dns, hosts, proxies, ca_certificates"),
        ({"dns": "192.0.2.53"}, "dns", "is a list"),
        ({"dns": ["192.0.2.53"] * 9}, "dns", "up to 8"),
        ({"dns": [53]}, "dns", "it is an address like"),
        ({"dns": ["dns.example"]}, "dns", '"dns.example"'),
        ({"dns": ["192.0.2.53:0"]}, "dns", "it is an address like"),
        ({"dns": ["192.0.2.53:65536"]}, "dns", "it is an address like"),
        ({"dns": ["192.0.2.256:53"]}, "dns", "it is an address like"),
        ({"hosts": ["a"]}, "hosts", "is a mapping"),
        ({"hosts": {"a b": "192.0.2.1"}}, "a b", "cannot be the name of a host"),
        ({"hosts": {"192.0.2.1": "192.0.2.1"}}, "192.0.2.1", "cannot be the name of a host"),
        ({"hosts": {"a": 5}}, "a", "in quotes"),
        ({"hosts": {"a": "192.0.2.256"}}, "a", "neither an address nor"),
        ({"hosts": {"A": "a."}}, "A", "stands for itself"),
        ({"proxies": True}, "proxies", '"environment", "none"'),
        ({"proxies": {"http": "http://p:1"}}, "http", "did you mean http_proxy?"),
        ({"proxies": {"http_proxy": 1}}, "http_proxy", "in quotes"),
        ({"proxies": {"http_proxy": "http://a b"}}, "http_proxy", "percent-encoded"),
        ({"proxies": {"http_proxy": "http://"}}, "http_proxy", "not the URL of a proxy"),
        ({"ca_certificates": "host"}, "ca_certificates", "is a list"),
        ({"ca_certificates": ["corp.pem"]}, "ca_certificates", "begins with / or ~/"),
        ({"ca_certificates": ["/a\0b"]}, "ca_certificates", "NUL"),
    ],
)
def test_what_is_refused(values: Any, key: str, reason: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        from_json(values)
    assert caught.value.key == key
    assert reason in str(caught.value)


@given(
    st.dictionaries(
        st.sampled_from(["dns", "hosts", "proxies", "ca_certificates", "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    )
)
def test_whatever_is_written_is_taken_or_refused_and_taken_again(values: dict[str, Any]) -> None:
    try:
        settings = from_json(values)
    except InvalidSetting:
        return
    assert from_json(as_json(settings)) == settings == from_json(in_full(settings))
    assert set(in_full(settings)) == set(KEYS)
