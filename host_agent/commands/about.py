"""``version``, and ``completion``: about the program itself."""

from __future__ import annotations

import platform
from typing import Any

import click

from host_agent.commands.common import json_option
from host_agent.paths import Home

#: In the environment of a shell that asks what can be typed next; click's own way.
_COMPLETE_VARIABLE = "_AGENTCTL_COMPLETE"

_HOW = {
    "bash": 'eval "$(agentctl completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(agentctl completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "agentctl completion fish >~/.config/fish/completions/agentctl.fish",
}


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Show which agentctl this is: its version, its sources' digest, and the image that it starts VMs from."""
    from host_agent import show

    facts = _facts()
    if as_json:
        show.as_json(facts)
    else:
        show.facts({name: str(value) for name, value in facts.items()})


def _facts() -> dict[str, Any]:
    from importlib import metadata

    from protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR, build
    from provision import recipe as recipes

    try:
        installed = metadata.version("agentctl")
    except metadata.PackageNotFoundError:
        installed = "not installed"  # run from a checkout
    return {
        "version": installed,
        "build": build.digest(),
        "protocol": f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}",
        "image": recipes.load().digest,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "home": str(Home.find().root),
    }


@click.command(epilog="\b\n" + "\n".join(_HOW.values()))
@click.argument("shell", type=click.Choice(list(_HOW)))
def completion(shell: str) -> None:
    """Print what makes SHELL complete agentctl's commands, options and instances."""
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None, "click knows all that can be chosen"
    click.echo(kind(root, {}, "agentctl", _COMPLETE_VARIABLE).source())


def complete_source(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Of files to copy: those of this machine, and what those of an instance begin with."""
    from click.shell_completion import CompletionItem

    from host_agent.copy_words import GUEST

    prefixes = [f"{name}:" for name in (GUEST, *(paths.name for paths in Home.find().instances()))]
    if incomplete.startswith(tuple(prefixes)):
        return []
    begun = [CompletionItem(prefix) for prefix in prefixes if incomplete and prefix.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *begun]
