"""The docker context that makes the host's docker CLI talk to the VM.

The files are written here rather than by ``docker context create`` and ``use``: there may be no docker CLI
yet, and the CLI (28.2 was tried) replaces a config.json it cannot parse and drops keys it does not know.
The law: what is not ours is kept as it is. A config.json that cannot be understood or written costs a
warning and is left alone; the previous context comes back only if ours is still the current one.

Layout, from docker/cli's cli/context/store: ``contexts/meta/SHA256(NAME)/meta.json`` describes a context,
``contexts/tls/SHA256(NAME)/`` would hold its keys, and ``currentContext`` in config.json names the current
one; absent, empty or ``default`` is the built-in one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from host_agent.files import write_atomically

BUILT_IN = "default"


@dataclass(frozen=True, slots=True)
class Activation:
    """What activating a context did. To be kept in the instance's state until ``restore``.

    ``previous`` is the context that was current before, empty for the built-in one; ``active`` is False when
    config.json could not be changed, and ``warning`` then is the sentence that says so.
    """

    context: str
    previous: str
    active: bool
    warning: str = ""


class _UnusableConfig(Exception):
    """config.json is not to be touched; the message says why."""


def context_name(instance: str) -> str:
    """The name of the context of an instance."""
    return "agentctl" if instance == "default" else f"agentctl-{instance}"


def config_dir(environ: Mapping[str, str]) -> Path:
    """The docker CLI's directory: $DOCKER_CONFIG, else ~/.docker."""
    if configured := environ.get("DOCKER_CONFIG"):
        return Path(configured)
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".docker"


def create(directory: Path, name: str, docker_socket: Path, description: str = "") -> None:
    """Write the context ``name`` in the CLI's ``directory``, or bring it up to date.

    Raises:
        OSError: the directory cannot be written.
    """
    metadata = {
        "Name": name,
        "Metadata": {"Description": description or f"The Docker engine of {name}'s VM"},
        "Endpoints": {"docker": {"Host": f"unix://{docker_socket}", "SkipTLSVerify": False}},
    }
    folder = _metadata_folder(directory, name)
    if not directory.exists():
        # Made private, as the CLI does when it stores credentials there.
        directory.mkdir(mode=0o700, parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "meta.json", json.dumps(metadata).encode(), mode=0o644, inherit=True)


def current(directory: Path) -> str | None:
    """The name of the current context, empty for the built-in one; None if config.json cannot be read."""
    try:
        return _current(_read(directory))
    except _UnusableConfig:
        return None


def activate(directory: Path, name: str, before: Activation | None = None) -> Activation:
    """Make ``name`` the current context.

    ``before`` is the activation in the instance's state, if there is one: when ours is current already (the
    agent was killed before it could restore), what was current before that is remembered still.
    """
    remembered = before.previous if before is not None and before.context == name else ""
    try:
        config = _read(directory)
        previous = _current(config)
        if previous == name:
            return Activation(name, remembered, active=True)
        config["currentContext"] = name
        _write(directory, config)
    except _UnusableConfig as error:
        warning = (
            f"{error}; run `docker --context {name} ...` or set DOCKER_CONTEXT={name} to use the VM's Docker"
        )
        return Activation(name, remembered, active=False, warning=warning)
    return Activation(name, previous, active=True)


def restore(directory: Path, activation: Activation) -> str:
    """Make the context current that was so before, if ours still is. Returns a warning, or an empty string.

    If the previous context has been removed meanwhile, or belongs to another instance that is down, the
    built-in one becomes current.
    """
    try:
        config = _read(directory)
        if _current(config) != activation.context:
            return ""
        del config["currentContext"]
        if activation.previous and _usable(directory, activation.previous):
            config["currentContext"] = activation.previous
        _write(directory, config)
    except _UnusableConfig as error:
        return f"{error}; the docker context {activation.context} may still be the current one"
    return ""


def delete(directory: Path, name: str) -> str:
    """Remove the context ``name``; the built-in one becomes current if it was. Returns a warning or "".

    Nothing happens when there is none.
    """
    warning = restore(directory, Activation(name, "", active=True))
    for kind in ("meta", "tls"):
        shutil.rmtree(directory / "contexts" / kind / _digest(name), ignore_errors=True)
    return warning


def of_sockets_below(directory: Path, folder: Path) -> dict[str, Path]:
    """The contexts whose socket is somewhere in ``folder``, by name, and the sockets."""
    found = {}
    for metadata in sorted((directory / "contexts" / "meta").glob("*/meta.json")):
        try:
            context = json.loads(metadata.read_bytes())
            name, host = context["Name"], context["Endpoints"]["docker"]["Host"]
            socket = Path(host.removeprefix("unix://"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if isinstance(name, str) and host.startswith("unix://") and socket.is_relative_to(folder):
            found[name] = socket
    return found


def extra_plugin_dirs(directory: Path) -> tuple[Path, ...]:
    """Where config.json (``cliPluginsExtraDirs``) tells the CLI to look for plugins first."""
    try:
        folders = _read(directory).get("cliPluginsExtraDirs")
    except _UnusableConfig:
        return ()
    return tuple(Path(folder) for folder in folders if folder) if isinstance(folders, list) else ()


def unusable(directory: Path) -> str:
    """Why docker's config.json cannot be used to activate a context, in a sentence; empty if it can."""
    try:
        _current(_read(directory))
    except _UnusableConfig as error:
        return str(error)
    return ""


def override_warning(environ: Mapping[str, str], name: str, docker_socket: Path) -> str:
    """The sentence for a user whose environment makes the CLI disregard the current context, else "".

    DOCKER_HOST wins over DOCKER_CONTEXT, which wins over config.json.
    """
    if host := environ.get("DOCKER_HOST"):
        if host == f"unix://{docker_socket}":
            return ""
        return _overridden(f"DOCKER_HOST={host}", name)
    context = environ.get("DOCKER_CONTEXT")
    if context and context != name:
        return _overridden(f"DOCKER_CONTEXT={context}", name)
    return ""


def _overridden(setting: str, name: str) -> str:
    return f"{setting} is set and wins over the docker context {name}; unset it to use the VM's Docker"


def _usable(directory: Path, name: str) -> bool:
    """Whether a context exists and, if an instance of ours made it, its socket is there."""
    try:
        metadata = json.loads((_metadata_folder(directory, name) / "meta.json").read_bytes())
        if name != context_name("default") and not name.startswith(context_name("")):
            return True
        return Path(metadata["Endpoints"]["docker"]["Host"].removeprefix("unix://")).exists()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _metadata_folder(directory: Path, name: str) -> Path:
    return directory / "contexts" / "meta" / _digest(name)


def _current(config: Mapping[str, object]) -> str:
    name = config.get("currentContext", "")
    if not isinstance(name, str):
        raise _UnusableConfig("docker's config.json has a currentContext that is not a string")
    return "" if name == BUILT_IN else name


def _read(directory: Path) -> dict[str, object]:
    """config.json; like the CLI, take a file that is missing or empty for an empty object."""
    path = directory / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        config: object = json.loads(text) if text.strip() else {}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _UnusableConfig(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _UnusableConfig(f"{path} is not valid JSON and was left alone") from error
    if not isinstance(config, dict):
        raise _UnusableConfig(f"{path} is not a JSON object and was left alone")
    return config


def _write(directory: Path, config: Mapping[str, object]) -> None:
    """Replace config.json, through a symlink if it is one; laid out as by the CLI, 0600 if new."""
    path = directory / "config.json"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(Path(os.path.realpath(path)), json.dumps(config, indent="\t").encode(), inherit=True)
    except OSError as error:
        raise _UnusableConfig(f"{path} cannot be written ({error.strerror})") from error
