"""The command line. Thin: each command reads its words, asks the host agent and prints the answer.

Exit codes are ``host_agent.errors.ExitCode``; ``exec`` and ``shell`` end with the guest process's own.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import click
import trio

from host_agent import config as configuration
from host_agent import groups, mounts, sizes, state
from host_agent.client import RESTART_TIME, ConnectionLost, all_forwards, connected, not_running
from host_agent.config import Wishes
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import Exec, Forward, GetMounts, GetStatus, InstanceStatus, MountState, Stage, StopInstance
from protocol.api import Mounts as MountTable
from protocol.errors import RemoteFailure
from protocol.link import Link

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

#: Longer than the host agent lets the guest take, so that its own answer arrives first, seconds.
STOP_TIME = 200.0

#: Host agents that may be lost while they stop the instance before `stop` gives up.
STOP_ATTEMPTS = 3


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


def main() -> NoReturn:
    """The entry point: errors become a sentence, a hint and an exit code."""
    from host_agent import show

    _open_standard_streams()
    try:
        cli.main(prog_name="agentctl", standalone_mode=False)
    except UserError as error:
        show.error(error)
        sys.exit(error.exit_code)
    except RemoteFailure as error:
        show.error(UserError(error.message, error.hint))
        sys.exit(ExitCode.GENERAL)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        hint = (
            f"see: {error.ctx.command_path} --help"
            if isinstance(error, click.UsageError) and error.ctx
            else ""
        )
        show.error(UserError(error.format_message(), hint))
        sys.exit(ExitCode.USAGE)
    except (KeyboardInterrupt, click.Abort):
        show.error(UserError("interrupted"))
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone, like `agentctl ports | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.GENERAL)
    except OSError as error:
        show.error(UserError(f"{error.strerror}: {error.filename}" if error.filename else str(error)))
        sys.exit(ExitCode.GENERAL)
    except Exception as error:
        if os.environ.get("AGENTCTL_DEBUG"):
            raise
        message = f"unexpected {type(error).__name__}: {error}"
        show.error(UserError(message, "set AGENTCTL_DEBUG=1 to see where, and report it"))
        sys.exit(ExitCode.GENERAL)
    sys.exit(0)


def _open_standard_streams() -> None:
    """A closed stdin, stdout or stderr (``<&-``) is an empty one: its number must not go to another file."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


@click.group(context_settings=CONTEXT_SETTINGS, invoke_without_command=True)
@click.version_option(package_name="agentctl", prog_name="agentctl")
@click.pass_context
def cli(context: click.Context) -> None:
    """A Linux VM for containers that feels like localhost."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _instance() -> InstancePaths:
    return Home.find().instance()


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@cli.command()
@click.option("--cpus", type=int, help="Processors of the VM.")
@click.option("--memory", type=Size(), help="Memory of the VM, like 4GiB.")
@click.option("--disk", type=Size(), help="Size of the data disk, like 60GiB; it only grows.")
@click.option(
    "--accel",
    "accelerator",
    type=click.Choice(configuration.ACCELERATORS),
    help="What runs the VM; auto tries what this machine has.",
)
@click.option(
    "--mount",
    "folders",
    multiple=True,
    metavar="PATH[:GUESTPATH][:ro|:rw]",
    help="A folder that the VM sees, at the same path or another; ,locks=host after it: its locks reach the host."
    " May be repeated.",
)
@click.option(
    "--bulk/--no-bulk",
    default=None,
    help="Move data through memory shared with the VM, as is usual, or not, for comparison.",
)
@json_option
def up(
    cpus: int | None,
    memory: int | None,
    disk: int | None,
    accelerator: str | None,
    folders: tuple[str, ...],
    bulk: bool | None,
    as_json: bool,
) -> None:
    """Start the VM, and wait until Docker answers.

    What the flags ask for is remembered for the next start. The first run builds the guest image, which
    takes a few minutes.

    The VM sees your home at the same path, and the folder that this is called in. --mount chooses others
    instead of these ("--mount ~ --mount /srv" keeps the home); "--mount none" chooses none. Folders can be
    added while the VM runs; to take one away or make it read-only needs a restart.
    """
    from host_agent import show
    from host_agent import up as starting
    from host_agent.progress import progress

    home = Home.find()
    chosen = mounts.chosen(folders, home.root) if folders else None
    with progress() as report:
        wishes = Wishes(cpus, memory, disk, accelerator, chosen, bulk)
        result = starting.run(home, home.instance(), wishes, report)
    if result.note:
        show.note(result.note)
    for warning in result.warnings:
        show.warning(warning)
    if as_json:
        show.status_json(result.status)
    else:
        show.status(result.status)


@cli.command()
@click.option("--force", is_flag=True, help="Do not wait for containers to stop in good order.")
def stop(force: bool) -> None:
    """Shut the VM down; containers, images and volumes stay."""
    from host_agent import show
    from host_agent.progress import progress

    paths = _instance()
    with progress() as report:
        report("stopping")
        stopped = groups.run(_stop, paths, force)
    show.err().print("stopped" if stopped else "not running")


async def _stop(paths: InstancePaths, force: bool) -> bool:
    """Whether there was something to stop."""
    from host_agent import ending

    if not state.is_locked(paths.lock):
        if paths.directory.exists() and state.is_locked(paths.up_lock):
            raise UserError(
                f"instance {paths.name} is just being started by another command",
                "interrupt that one, or wait for it",
                ExitCode.BUSY,
            )
        return await ending.end_orphan(paths)
    failure: UserError | RemoteFailure | None = None
    for _ in range(STOP_ATTEMPTS):
        try:
            async with connected(paths, patience=RESTART_TIME) as link:
                await link.request(StopInstance(force), timeout=STOP_TIME)
        except (UserError, RemoteFailure) as error:
            failure = error
        # Its answer may have been lost, and its keeper goes after it: the lock tells.
        if await ending.lock_is_free(paths):
            return True
        if not isinstance(failure, ConnectionLost):
            break
        # It was killed while it stopped the instance, and another one goes on with that.
    if force:
        await ending.end_by_force(paths)
        return True
    raise failure or UserError(
        f"the host agent of {paths.name} does not end", "end it: agentctl stop --force", ExitCode.BUSY
    )


@cli.command()
@json_option
def status(as_json: bool) -> None:
    """Show the instance: state, resources, addresses.

    Exit status 0 if it runs, 6 if it does not.
    """
    from host_agent import show

    current = groups.run(_status, _instance())
    (show.status_json if as_json else show.status)(current)
    if current.stage in (Stage.STOPPED, Stage.FAILED):
        sys.exit(ExitCode.NOT_RUNNING)


async def _status(paths: InstancePaths) -> InstanceStatus:
    if not state.is_locked(paths.lock):
        return _status_at_rest(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        return await link.request(GetStatus())


def _status_at_rest(paths: InstancePaths) -> InstanceStatus:
    """An instance that does not run, told from what it left behind."""
    from host_agent import docker_context
    from host_agent.process import ProcessIdentity
    from protocol import build

    config = configuration.load(paths.config, configuration.Host.measure())
    last = state.load(paths.state)
    stage, detail, hint = Stage.STOPPED, "start it: agentctl up", ""
    if last.failure:
        stage, detail, hint = Stage.FAILED, last.failure, last.hint
    elif last.wanted:
        stage, detail, hint = Stage.FAILED, "the host agent was killed", "start it again: agentctl up"
        if ProcessIdentity.read(paths.qemu_identity):
            detail, hint = "the host agent was killed, and the VM runs on", "take it over again: agentctl up"
    return InstanceStatus(
        name=paths.name,
        stage=stage,
        detail=detail,
        hint=hint,
        accelerator=last.accelerator or config.accelerator,
        cpus=config.cpus,
        memory=config.memory,
        disk=config.disk,
        image="",
        qemu_pid=0,
        agent_pid=0,
        started_at=last.started_at,
        restarts=last.boot_restarts,
        guest_connected=False,
        guest_digest="",
        host_digest=build.digest(),
        docker_socket=str(paths.docker_socket),
        docker_context=docker_context.context_name(paths.name),
    )


@cli.command()
@click.option("--all", "everything", is_flag=True, help="Also those that are ignored.")
@json_option
def ports(everything: bool, as_json: bool) -> None:
    """Show what listens in the VM, and where it is on localhost."""
    from host_agent import show

    rows = groups.run(_forwards, _instance())
    if as_json:
        show.forwards_json(rows)
    else:
        show.forwards(rows, everything=everything)


async def _forwards(paths: InstancePaths) -> list[Forward]:
    _require_running(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        return await all_forwards(link)


@cli.command("mounts")
@json_option
def list_mounts(as_json: bool) -> None:
    """Show which folders of this machine the VM sees, and how each is doing."""
    from host_agent import show

    table = groups.run(_mounts, _instance())
    (show.mounts_json if as_json else show.mounts)(table)


async def _mounts(paths: InstancePaths) -> MountTable:
    _require_running(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        return await link.request(GetMounts())


def _require_running(paths: InstancePaths) -> None:
    if not state.is_locked(paths.lock):
        raise not_running(paths)


@cli.command(
    "exec",
    context_settings={**CONTEXT_SETTINGS, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "-t/-T", "--tty/--no-tty", "with_tty", default=None, help="With a terminal, or without; as stdin is."
)
@click.option("-u", "--user", default="", help="User of the guest; the default is the one named like you.")
@click.option(
    "-w", "--workdir", default="", help="Folder of the guest to run in; the default is this one, if shared."
)
@click.option("-e", "--env", "variables", multiple=True, metavar="NAME=VALUE", help="Set a variable.")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(
    with_tty: bool | None, user: str, workdir: str, variables: tuple[str, ...], argv: tuple[str, ...]
) -> None:
    """Run a command in the VM; its exit status is ours."""
    environment = {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{variable!r} is not NAME=VALUE")
        environment[name] = value
    _run_in_guest(list(argv), user, environment, with_tty, _Workdir(workdir, shared=not workdir))


@cli.command()
@click.option("-u", "--user", default="", help="User of the guest; the default is the one named like you.")
def shell(user: str) -> None:
    """Open a login shell in the VM, in this folder if the VM has it."""
    _run_in_guest([], user, {}, None, _Workdir(mounts.here() or "", shared=True))


@dataclass(frozen=True, slots=True)
class _Workdir:
    """A folder of the guest; with ``shared``, rather where it has the working directory, if it is mounted."""

    otherwise: str
    shared: bool


def _run_in_guest(
    argv: list[str], user: str, environment: dict[str, str], with_tty: bool | None, workdir: _Workdir
) -> NoReturn:
    from host_agent import terminal

    if with_tty is None:
        with_tty = sys.stdin.isatty() and sys.stdout.isatty()
    elif with_tty and not sys.stdin.isatty():
        raise UserError("--tty was asked for, and stdin is not a terminal", "leave --tty out", ExitCode.USAGE)
    if with_tty and "TERM" in os.environ:
        environment = {"TERM": os.environ["TERM"], **environment}
    target = Exec(
        argv=argv,
        env=environment,
        cwd=workdir.otherwise,
        user=user,
        tty=terminal.window_size() if with_tty else None,
    )
    sys.exit(groups.run(_execute, _instance(), target, workdir.shared))


async def _execute(paths: InstancePaths, target: Exec, shared: bool) -> int:
    from host_agent import terminal

    _require_running(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        if shared and (directory := await _shared_directory(link)) is not None:
            target = replace(target, cwd=directory)
        return await terminal.run(link, target)


async def _shared_directory(link: Link) -> str | None:
    """Where the guest has the working directory; its home ("") while that mount does not work. None if nowhere."""
    directory = mounts.here()
    if directory is None:
        return None
    try:
        rows = (await link.request(GetMounts())).mounts
    except RemoteFailure:
        return None  # of an agentctl that had no mounts
    specs = [row.spec for row in rows]
    share = mounts.share_of(specs, directory)
    if share is None:
        return None
    works = any(row.spec == share and row.state in (MountState.MOUNTED, MountState.FULL) for row in rows)
    return mounts.guest_path_of(specs, directory) if works else ""


_LOG_COMMANDS = {
    "guest": ["journalctl", "--no-pager", "-u", "agentctl-*"],
    "docker": ["journalctl", "--no-pager", "-u", "docker", "-u", "containerd"],
    "system": ["journalctl", "--no-pager"],
}


@cli.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as more is written.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="How many lines from the end.",
)
@click.option(
    "--component",
    type=click.Choice(["host", "files", "console", "qemu", *_LOG_COMMANDS]),
    default="host",
    show_default=True,
    help="host: the host agent; files: its file server; console: the VM's boot; qemu: its errors; guest, docker,"
    " system: in the VM.",
)
def logs(follow: bool, lines: int, component: str) -> None:
    """Show what an agent, the VM or Docker wrote down."""
    from host_agent import logfiles

    paths = _instance()
    if component in _LOG_COMMANDS:
        argv = [*_LOG_COMMANDS[component], "-n", str(lines), *(["-f"] if follow else [])]
        _run_in_guest(argv, "root", {}, False, _Workdir("", shared=False))
    of_component = {
        "host": paths.agent_log,
        "files": paths.files_log,
        "console": paths.console_log,
        "qemu": paths.qemu_log,
    }
    logfiles.show(of_component[component], lines, follow=follow)


@cli.command()
@json_option
def env(as_json: bool) -> None:
    """Print what a shell needs to use the VM's Docker without the context: eval "$(agentctl env)"."""
    import shlex

    from host_agent import docker_tools, show

    home = Home.find()
    variables = {"DOCKER_HOST": f"unix://{home.instance().docker_socket}"}
    tools = trio.run(docker_tools.detect, home.tools)
    if tools.docker is not None and tools.docker.is_relative_to(home.tools):
        variables["PATH"] = f"{tools.docker.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if as_json:
        show.as_json(variables)
    else:
        for name, value in variables.items():
            click.echo(f"export {name}={shlex.quote(value)}")


@cli.command()
@click.option(
    "--data", is_flag=True, help="Also the data disk: containers, images, volumes, the guest's homes."
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def delete(data: bool, yes: bool) -> None:
    """Remove the instance; its data disk stays unless --data is given."""
    from host_agent import show
    from host_agent.remove import remove

    paths = _instance()
    if not paths.directory.exists():
        show.err().print("there is no such instance")
        return
    what = "the instance and everything on its data disk" if data else "the instance (its data disk stays)"
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"this would remove {what}", "say so with --yes", ExitCode.USAGE)
        if not click.confirm(f"Remove {what}?", err=True):
            show.err().print("nothing was removed")
            sys.exit(ExitCode.GENERAL)
    groups.run(_stop, paths, data)
    remove(paths, data=data)
    show.err().print("removed")
