"""How hard the property tests look: quick by default, twenty times longer with ``--long``."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

SETTINGS = settings(
    deadline=None, max_examples=60, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("quick", SETTINGS)
    settings.register_profile("long", SETTINGS, max_examples=1200)
    settings.load_profile("long" if config.getoption("--long", default=False) else "quick")
