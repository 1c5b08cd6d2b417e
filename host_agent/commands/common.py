"""What every command needs: the instance that is meant, the kinds of its words, and whether it runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from host_agent import sizes, state
from host_agent.agent_contact import not_running
from host_agent.errors import ExitCode
from host_agent.paths import Home, InstancePaths

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

#: How often a command that waits for another one's `up` looks how far it is, seconds.
UP_INTERVAL = 0.2

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes, written like 4GiB; a bare number is GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return sizes.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """For what goes on until Ctrl-C, which is no error: the exit code says so, and nothing else is said."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def current_instance() -> InstancePaths:
    """The instance that ``--instance`` names."""
    name: str = click.get_current_context().find_root().obj
    return Home.find().instance(name)


def complete_instance(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of instances that begin so."""
    names = (paths.name for paths in Home.find().instances())
    return [name for name in names if name.startswith(incomplete)]


def require_running(paths: InstancePaths) -> None:
    """Raise ``UserError`` if the instance does not run."""
    if not state.is_locked(paths.lock):
        raise not_running(paths)
