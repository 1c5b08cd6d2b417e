"""The command line: the group of all commands, and how each of them ends.

Exit codes are ``host_agent.errors.ExitCode``; ``exec`` and ``shell`` end with the guest process's own.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click
from click.core import ParameterSource

from host_agent import hints, kind
from host_agent.commands.common import CONTEXT_SETTINGS, complete_instance
from host_agent.commands.lazy import LazyGroup
from host_agent.commands.places import PLACES
from host_agent.errors import ExitCode, UserError
from host_agent.paths import DEFAULT_INSTANCE, Home, check_name
from protocol.errors import RemoteFailure

#: What a group without a command of its own is, since click 8.2: its help, which is several lines.
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())


def main() -> NoReturn:
    """The entry point: errors become a sentence, a hint and an exit code."""
    _open_standard_streams()
    try:
        cli.main(prog_name="agentctl", standalone_mode=False)
    except UserError as error:
        _say(error)
        sys.exit(error.exit_code)
    except RemoteFailure as error:
        _say(UserError(error.message, error.hint))
        sys.exit(ExitCode.GENERAL)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if isinstance(error, _NO_ARGUMENTS):
            error.show()
            sys.exit(ExitCode.USAGE)
        hint = (
            f"see: {error.ctx.command_path} --help"
            if isinstance(error, click.UsageError) and error.ctx
            else ""
        )
        _say(UserError(error.format_message(), hint))
        sys.exit(ExitCode.USAGE)
    except (KeyboardInterrupt, click.Abort):
        _say(UserError("interrupted"))
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone, like `agentctl ports | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.GENERAL)
    except OSError as error:
        _say(UserError(f"{error.strerror}: {error.filename}" if error.filename else str(error)))
        sys.exit(ExitCode.GENERAL)
    except Exception as error:
        if os.environ.get("AGENTCTL_DEBUG"):
            raise
        message = f"unexpected {type(error).__name__}: {error}"
        _say(UserError(message, "set AGENTCTL_DEBUG=1 to see where, and report it"))
        sys.exit(ExitCode.GENERAL)
    sys.exit(0)


def _say(error: UserError) -> None:
    from host_agent import show

    show.error(error)


def _open_standard_streams() -> None:
    """A closed stdin, stdout or stderr (``<&-``) is an empty one: its number must not go to another file."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


@click.group(cls=LazyGroup, places=PLACES, context_settings=CONTEXT_SETTINGS, invoke_without_command=True)
@click.version_option(package_name="agentctl", prog_name="agentctl")
@click.option(
    "--instance",
    metavar="NAME",
    envvar="AGENTCTL_INSTANCE",
    help="Which instance is meant, of any number side by side.",
    default=DEFAULT_INSTANCE,
    show_default=True,
    show_envvar=True,
    shell_complete=complete_instance,
)
@click.pass_context
def cli(context: click.Context, instance: str) -> None:
    """A Linux VM for containers that feels like localhost."""
    check_name(instance)
    context.obj = instance
    # What the environment says, it says to the next command as well.
    named = context.get_parameter_source("instance") is ParameterSource.COMMANDLINE
    hints.choose(instance if named else DEFAULT_INSTANCE)
    kind.choose(attached=Home.find().instance(instance).attached.exists())
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
