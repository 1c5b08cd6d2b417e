from __future__ import annotations

import pytest

from host_agent.proxies import MAX_LENGTH, check_proxy, of, reachable

HOST = "10.0.2.2"


@pytest.mark.parametrize(
    ("proxy", "reached"),
    [
        ("http://localhost:3128", "http://10.0.2.2:3128"),
        ("http://LOCALHOST:3128/", "http://10.0.2.2:3128/"),
        ("localhost:3128", "10.0.2.2:3128"),
        ("http://user:p%40ss@127.0.0.1:3128", "http://user:p%40ss@10.0.2.2:3128"),
        ("socks5h://127.1.2.3:1080", "socks5h://10.0.2.2:1080"),
        ("http://[::1]:3128", "http://10.0.2.2:3128"),
        ("http://0.0.0.0:3128", "http://10.0.2.2:3128"),
        ("http://squid.localhost", "http://10.0.2.2"),
        ("http://proxy.example:3128", "http://proxy.example:3128"),
        ("http://localhost.example:3128", "http://localhost.example:3128"),
        ("http://localhost@proxy.example:3128", "http://localhost@proxy.example:3128"),
        ("http://192.0.2.1:3128", "http://192.0.2.1:3128"),
        ("http://[2001:db8::1]:3128", "http://[2001:db8::1]:3128"),
    ],
)
def test_a_proxy_on_the_hosts_loopback_is_at_the_host(proxy: str, reached: str) -> None:
    assert reachable(proxy, HOST) == reached


def test_both_cases_and_what_needs_no_proxy() -> None:
    proxies = of(
        {
            "http_proxy": "http://localhost:1",
            "HTTPS_PROXY": "http://p:2",
            "NO_PROXY": "a.example, .b.example c",
        },
        HOST,
        ("localhost", "c", HOST),
    )
    assert proxies.problems == ()
    assert proxies.environment == {
        "http_proxy": "http://10.0.2.2:1",
        "HTTP_PROXY": "http://10.0.2.2:1",
        "https_proxy": "http://p:2",
        "HTTPS_PROXY": "http://p:2",
        "no_proxy": "a.example,.b.example,c,localhost,10.0.2.2",
        "NO_PROXY": "a.example,.b.example,c,localhost,10.0.2.2",
    }


def test_the_lower_case_counts() -> None:
    proxies = of({"http_proxy": "http://low", "HTTP_PROXY": "http://up"}, HOST, ())
    assert proxies.environment["HTTP_PROXY"] == "http://low"


def test_everything_without_a_proxy_stays_so() -> None:
    assert of({"all_proxy": "http://p", "no_proxy": "*"}, HOST, ("x",)).environment["no_proxy"] == "*"


@pytest.mark.parametrize("variables", [{}, {"http_proxy": ""}, {"no_proxy": "a"}, {"HTTP_PROXY": "  "}])
def test_without_a_proxy_nothing_is_said(variables: dict[str, str]) -> None:
    assert of(variables, HOST, ("x",)).environment == {}


@pytest.mark.parametrize(
    "value",
    ["http://p\nPATH=/evil", 'http://"p"', "http://p#x", "http://pä", "http://a b", "x" * 5000, "http:///x"],
)
def test_what_no_file_could_hold_is_left_out_said_and_not_repeated(value: str) -> None:
    proxies = of({"http_proxy": value, "https_proxy": "http://p"}, HOST, ("x",))
    assert set(proxies.environment) == {"https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"}
    (problem,) = proxies.problems
    assert problem.startswith("http_proxy was not passed on to the VM: it ")
    assert value not in problem


def test_the_longest_value_passes() -> None:
    assert check_proxy("no_proxy", "a" * MAX_LENGTH) == ""
    assert check_proxy("no_proxy", "a" * (MAX_LENGTH + 1)) != ""
