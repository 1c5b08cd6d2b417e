"""``attach`` and ``detach``: any Linux machine over SSH, as if it were this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from host_agent import groups, hints, kind
from host_agent.commands.common import json_option
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths

if TYPE_CHECKING:
    from host_agent.remote.attach import Ways, Wishes
    from host_agent.starting import UpResult


def _complete_attached(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Those that are attached, or were."""
    there = (paths.name for paths in Home.find().instances() if paths.attached.exists())
    return [name for name in there if name.startswith(incomplete)]


@click.command()
@click.option(
    "--mount",
    "folders",
    multiple=True,
    metavar="PATH[:REMOTE][:ro|:rw]",
    help="A folder of this machine that is to be there, too; ~ of REMOTE is your home there. May be repeated.",
)
@click.option(
    "--forward",
    "forwards",
    multiple=True,
    metavar="RULE",
    help='As of "forward add", for ports that are to be elsewhere than on the same port here. May be repeated.',
)
@click.option("--name", metavar="NAME", help="Of the instance; else it is called like the host.")
@click.option(
    "--keep/--no-keep", default=None, help="What runs there for us goes on when nobody is attached, or ends."
)
@json_option
@click.argument("machine", metavar="[USER@]HOST[:PORT]", shell_complete=_complete_attached)
def attach(
    machine: str,
    folders: tuple[str, ...],
    forwards: tuple[str, ...],
    name: str | None,
    keep: bool | None,
    as_json: bool,
) -> None:
    """Make a Linux machine that you reach with ssh feel like this one, without a VM.

    \b
    agentctl attach me@build.example.com --mount ~/src
    agentctl --instance build-example-com exec -w src make
    agentctl detach build-example-com

    What listens there is on localhost here, folders of this machine are there, and exec, shell, cp, ports, mounts,
    top and the rest work with --instance NAME. It takes sshd and Python 3.11 there, and no root. HOST may be one of
    ~/.ssh/config. A machine that was attached before is attached again by its name, with all it had.

    A folder of your home is in your home there; any other is at the same path, unless REMOTE says where.
    """
    from host_agent.commands.lifecycle import show_started
    from host_agent.remote.attach import Wishes, instance_of

    paths, address = instance_of(Home.find(), machine, name if name is not None else _named())
    hints.choose(paths.name)
    kind.choose(attached=True)
    show_started(attached(paths, address, Wishes(folders, forwards, keep)), as_json=as_json)


def attached(paths: InstancePaths, address: str, wishes: Wishes) -> UpResult:
    """Attach it, asking at the terminal if there is one, with progress."""
    from host_agent.progress import progress
    from host_agent.remote.attach import Attempt
    from host_agent.remote.prompts import Terminal

    terminal = Terminal()
    try:
        with progress(terminal) as report:
            return Attempt(paths, address, wishes, report, _ways(), terminal).run()
    except UserError:
        if terminal.interrupted:
            raise KeyboardInterrupt from None
        raise


def _ways() -> Ways:
    from host_agent.remote import over_ssh
    from host_agent.remote.attach import Ways

    return Ways(over_ssh.open_way, over_ssh.install)


def again(paths: InstancePaths, wishes: Wishes) -> UpResult:
    """Attach an instance that was attached before: what ``up``, ``start`` and ``restart`` do with one."""
    from host_agent.remote import record

    found = record.load(paths)
    assert found is not None, "the caller has looked"
    return attached(paths, found.address, wishes)


def _named() -> str | None:
    """What ``--instance`` says, if it says anything."""
    root = click.get_current_context().find_root()
    chosen: str = root.obj
    given = root.get_parameter_source("instance") is ParameterSource.COMMANDLINE
    return chosen if given else None


@click.command()
@click.option("--force", is_flag=True, help="Also what was to be kept running there; do not wait for it.")
@click.argument("name", required=False, shell_complete=_complete_attached)
def detach(name: str | None, force: bool) -> None:
    """Let go of a machine: its ports and folders go, and what runs there for agentctl ends.

    NAME is the instance or the machine's address; without it the only one that is attached. What it had is remembered
    for the next "attach NAME"; "delete" forgets it.
    """
    from host_agent import show
    from host_agent.commands.lifecycle import stop_instance
    from host_agent.progress import progress

    paths = _attached_instance(Home.find(), name if name is not None else _named())
    hints.choose(paths.name)
    kind.choose(attached=True)
    with progress() as report:
        report("detaching")
        stopped = groups.run(stop_instance, paths, force)
    show.err().print("detached" if stopped else "not attached")


def _attached_instance(home: Home, name: str | None) -> InstancePaths:
    """Raises ``UserError`` (USAGE, NOT_RUNNING)."""
    from host_agent import state

    attached = {paths.name: paths for paths in home.instances() if paths.attached.exists()}
    if name is not None:
        found = [each for each in attached.values() if name in (each.name, _address(each))]
        if len(found) == 1 or name in attached:
            return attached.get(name) or found[0]
        if any(paths.name == name for paths in home.instances()):
            raise UserError(
                f"instance {name} is a VM", f"stop it: agentctl --instance {name} stop", ExitCode.USAGE
            )
        raise UserError(f"no machine is attached as {name}", "see: agentctl list", ExitCode.NOT_RUNNING)
    running = [paths for paths in attached.values() if state.is_locked(paths.lock)]
    if len(running) == 1:
        return running[0]
    if running:
        names = ", ".join(paths.name for paths in running)
        raise UserError(
            f"several machines are attached: {names}", "say which: agentctl detach NAME", ExitCode.USAGE
        )
    raise UserError("no machine is attached", "see: agentctl list", ExitCode.NOT_RUNNING)


def _address(paths: InstancePaths) -> str:
    from host_agent.remote import record

    try:
        found = record.load(paths)
    except UserError:
        return ""
    return found.address if found else ""
