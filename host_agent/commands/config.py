"""What an instance is to be: ``config show``, ``edit``, ``set``, ``validate``, ``schema``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from host_agent import state
from host_agent.commands.common import current_instance, json_option
from host_agent.errors import UserError
from host_agent.paths import Home, InstancePaths

if TYPE_CHECKING:
    from host_agent.configuration.config import InstanceConfig
    from host_agent.configuration.file import ConfigFile

template_option = click.option(
    "--template", "of_template", is_flag=True, help="What new instances begin as, instead of an instance."
)


@click.group("config")
def config() -> None:
    """What the instance is to be: its resources, folders, ports, network.

    It is a file of yours, ~/.agentctl/instances/default/config.yaml, with a comment for each key.
    """


def _file(of_template: bool) -> ConfigFile:
    from host_agent.configuration.file import ConfigFile

    return ConfigFile(Home.find(), None if of_template else current_instance())


@config.command("show")
@template_option
@json_option
def show_config(of_template: bool, as_json: bool) -> None:
    """Show every key as it is, also those that the file leaves out."""
    from host_agent import show
    from host_agent.configuration import keys as config_keys
    from host_agent.configuration.config import Host, load, understood
    from host_agent.configuration.dump import dump

    file, host = _file(of_template), Host.measure()
    found = (
        load(file.instance, host) if file.instance else understood(file.path, file.text(host).encode(), host)
    )
    values = config_keys.plain(found)
    waiting = _waiting(file.instance, found) if file.instance else ()
    if as_json:
        show.as_json({"path": str(file.path), "config": values, "waiting_for_restart": list(waiting)})
        return
    show.yaml(f"# {file.path}" + ("" if file.path.exists() else " (not there yet)") + "\n" + dump(values))
    if waiting:
        show.warning(_waits(waiting))


@config.command()
@template_option
def edit(of_template: bool) -> None:
    """Change it in your editor ($VISUAL, $EDITOR); it is checked before it counts.

    What can be applied to a VM that runs is; what needs a restart is said.
    """
    from host_agent import show

    file = _file(of_template)
    changed = edited(file)
    if changed is None:
        show.err().print("nothing was changed")
    else:
        _apply(file.instance, changed)


def edited(file: ConfigFile) -> InstanceConfig | None:
    """Let the user edit until it is understood, or they give up; None if nothing was changed."""
    from host_agent import editor, show
    from host_agent.configuration.config import Host
    from host_agent.configuration.file import NotUnderstood

    if file.draft.exists():
        show.note(f"this is the text that could not be used before; to begin afresh: rm {file.draft}")
    while True:
        try:
            return file.edited(editor.edit, Host.measure())
        except UserError as error:
            if not file.draft.exists():
                raise
            mistakes = error.mistakes if isinstance(error, NotUnderstood) else []
            for mistake in mistakes[1:]:
                show.warning(str(mistake).strip())
            if not sys.stdin.isatty():
                raise _kept(error, file) from None
            show.error(UserError(error.message))
            if not click.confirm("Edit it again?", default=True, err=True):
                raise _kept(error, file) from None


def _kept(error: UserError, file: ConfigFile) -> UserError:
    hint = f"nothing was changed; your text is in {file.draft}: agentctl config edit"
    return UserError(error.message, hint, error.exit_code)


@config.command("set")
@template_option
@click.argument("words", nargs=-1, required=True, metavar="KEY=VALUE...")
def set_keys(words: tuple[str, ...], of_template: bool) -> None:
    """Change single keys: all of them, or none if one cannot be.

    \b
    agentctl config set cpus=2 memory=4GiB ports.lan=true
    agentctl config set network.hosts.db.test=192.0.2.7 'mounts=[~, /srv/data:/data:ro]'
    agentctl config set memory=          as it is by default

    Values are written as in the file. What can be applied to a VM that runs is; what needs a restart is said.
    """
    from host_agent.configuration import change as config_set
    from host_agent.configuration.config import Host, InstanceConfig
    from host_agent.configuration.file import NotUnderstood
    from host_agent.configuration.text import InvalidText
    from host_agent.errors import ExitCode

    file, host = _file(of_template), Host.measure()
    assignments = [config_set.parse(word) for word in words]
    default = InstanceConfig.default(host)
    try:
        changed = file.change(lambda text: config_set.applied(text, assignments, default), host)
    except NotUnderstood as error:
        # Of a text that nobody will see, a line says nothing.
        raise UserError(
            error.mistakes[0].sentence, "nothing was changed; see: agentctl config show", ExitCode.USAGE
        ) from None
    except InvalidText as error:
        raise UserError(
            f"{file.path} line {error.line}: {error}", "correct it: agentctl config edit", ExitCode.USAGE
        ) from None
    _apply(file.instance, changed)


@config.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
def validate(file: Path | None, as_json: bool) -> None:
    """Check FILE, or the instance's configuration: every mistake with its line.

    Exit status 0 if it can be used, 2 if it is not understood, 4 if this machine cannot give what it asks for.
    """
    from host_agent import show
    from host_agent.configuration import config as configuration
    from host_agent.configuration.config import Host, InstanceConfig, Mistake
    from host_agent.errors import ExitCode

    chosen, host = _file(False), Host.measure()
    path = file or chosen.path
    content = path.read_bytes() if file or path.exists() else chosen.text(host).encode()
    found = configuration.examined(content, host)
    mistakes, code = ([], 0) if isinstance(found, InstanceConfig) else (found, int(ExitCode.USAGE))
    hint = configuration.EDIT_HINT if file is None else ""
    if isinstance(found, InstanceConfig):
        try:
            configuration.check(found, host)
        except UserError as error:
            mistakes, code, hint = [Mistake(0, error.message)], int(error.exit_code), ""
    if as_json:
        listed = [{"line": mistake.line, "message": mistake.sentence} for mistake in mistakes]
        show.as_json({"path": str(path), "valid": not mistakes, "mistakes": listed})
    elif not mistakes:
        show.err().print(show.words(f"{path}: no mistakes"))
    else:
        for mistake in mistakes:
            show.error(UserError(f"{path}{mistake}", hint if mistake is mistakes[-1] else ""))
    sys.exit(code)


@config.command()
def schema() -> None:
    """Print the JSON Schema of the file, for editors and programs; the file names it in its first line."""
    from host_agent import show
    from host_agent.configuration import keys as config_keys

    show.as_json(config_keys.schema())


# --- of an instance that runs ----------------------------------------------------------------------


def _apply(paths: InstancePaths | None, changed: InstanceConfig) -> None:
    """Make it so in an instance that runs, as far as that can be, and say the rest."""
    from host_agent import applying, show
    from host_agent.commands.status import status_of
    from protocol.api import Stage

    if paths is None:
        show.err().print("new instances begin so")
        return
    if not state.is_locked(paths.lock):
        show.err().print("remembered for the next start")
        return
    running = status_of(paths)
    if running.stage is not Stage.RUNNING:
        show.warning(f"the instance is {running.stage} just now; to apply this to it, later: agentctl up")
        return
    for warning in applying.apply(paths, running, changed):
        show.warning(warning)
    show.err().print("applied")


def _waiting(paths: InstancePaths, found: InstanceConfig) -> tuple[str, ...]:
    from host_agent import applying, mounts
    from host_agent.commands.status import status_of
    from host_agent.configuration.config import load_kept

    if not state.is_locked(paths.lock):
        return ()
    waiting = applying.waiting_for_restart(paths, status_of(paths), found)
    kept = load_kept(paths.running_config)
    later = kept is not None and mounts.compare(kept.mounts, found.mounts).later
    return (*waiting, "mounts") if later else waiting


def _waits(names: tuple[str, ...]) -> str:
    return f"{', '.join(names)}: not so yet in the VM that runs; to restart it: agentctl restart"
