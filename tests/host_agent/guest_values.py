"""Settings of the guest from what the file says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from host_agent.configuration import keys as config_keys
from host_agent.configuration.keys import Host, InstanceConfig
from host_agent.guest_settings import GuestSettings

PLAIN = InstanceConfig.default(Host(4, 8 << 30))


def config(values: dict[str, Any]) -> InstanceConfig:
    reading = config_keys.read(values)
    assert not reading.errors
    return replace(PLAIN, **reading.values)


def from_json(values: dict[str, Any]) -> GuestSettings:
    return config(values).guest
