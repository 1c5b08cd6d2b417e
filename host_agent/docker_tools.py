"""The docker CLI and its compose and buildx plugins, for hosts that lack them.

They are unpacked from Debian's packages into the tool's own directory: the same release as the engine in
the VM, verified by apt's signatures and hashes, without root, and without a package being installed or a
daemon brought along. apt works in a private state directory with one source, so neither the host's release
(Debian 12 has no docker-cli) nor its package lists matter; the binaries need only libc 2.34 (Debian 12,
Ubuntu 22.04). The law: what is in the directory is complete and has run once; a tool gets its name last.

    TOOLS_DIR/bin/docker
    TOOLS_DIR/cli-plugins/docker-compose, docker-buildx
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import trio

from host_agent.docker_context import config_dir, extra_plugin_dirs
from host_agent.errors import ExitCode, UserError

# A sentence about what is being done, and the part of it that is done, from 0 to 1.
Progress = Callable[[str, float], None]

# Where the CLI looks for plugins after its own configuration (docker/cli, cli-plugins/manager).
SYSTEM_PLUGIN_DIRS = (
    Path("/usr/local/lib/docker/cli-plugins"),
    Path("/usr/local/libexec/docker/cli-plugins"),
    Path("/usr/lib/docker/cli-plugins"),
    Path("/usr/libexec/docker/cli-plugins"),
)

INSTALL_HINT = "install the docker CLI with the compose and buildx plugins; no Docker engine is needed"

# A tool that does not even say its version within this many seconds does not run here.
TRIAL_TIMEOUT = 30.0
# Lines of apt's output kept for its error message.
KEPT_LINES = 50
# How often to look whether another process has finished installing, in seconds.
LOCK_POLL = 0.2


@dataclass(frozen=True, slots=True)
class Source:
    """The Debian archive to take packages from, and the keys it must be signed with."""

    suite: str = "trixie"
    mirror: str = "http://deb.debian.org/debian"
    security_mirror: str = "http://deb.debian.org/debian-security"
    keyring: Path = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

    def lines(self, architecture: str) -> str:
        """A sources.list. ``target=Packages`` leaves out what desktops add to every update."""
        options = f"[arch={architecture} target=Packages signed-by={self.keyring}]"
        return (
            f"deb {options} {self.mirror} {self.suite} main\n"
            f"deb {options} {self.mirror} {self.suite}-updates main\n"
            f"deb {options} {self.security_mirror} {self.suite}-security main\n"
        )


DEBIAN = Source()


@dataclass(frozen=True, slots=True)
class Tool:
    """A program: its Debian package and path in there, its place in the tools directory, how to try it."""

    name: str
    package: str
    member: str
    place: str
    trial: tuple[str, ...]


DOCKER = Tool("docker", "docker-cli", "usr/bin/docker", "bin/docker", ("--version",))
COMPOSE = Tool(
    "compose",
    "docker-compose",
    "usr/libexec/docker/cli-plugins/docker-compose",
    "cli-plugins/docker-compose",
    ("docker-cli-plugin-metadata",),
)
BUILDX = Tool(
    "buildx",
    "docker-buildx",
    "usr/libexec/docker/cli-plugins/docker-buildx",
    "cli-plugins/docker-buildx",
    ("docker-cli-plugin-metadata",),
)
PLUGINS = (COMPOSE, BUILDX)


@dataclass(frozen=True, slots=True)
class DockerTools:
    """What a user has. ``docker`` is None without a CLI; ``installed`` names the tools that are ours."""

    docker: Path | None
    compose: bool
    buildx: bool
    installed: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[Tool, ...]:
        present = {DOCKER: self.docker is not None, COMPOSE: self.compose, BUILDX: self.buildx}
        return tuple(tool for tool, there in present.items() if not there)


async def detect(tools_dir: Path, environ: Mapping[str, str] = os.environ) -> DockerTools:
    """What is there now: the host's own CLI before ours, plugins wherever that CLI looks for them."""
    docker = await _host_docker(environ)
    own = tools_dir / DOCKER.place
    if docker is None and _is_program(own):
        docker = own
    folders = plugin_dirs(environ)
    compose, buildx = (
        any(_is_program(folder / Path(tool.place).name) for folder in folders) for tool in PLUGINS
    )
    installed = tuple(tool.name for tool in (DOCKER, *PLUGINS) if _is_program(tools_dir / tool.place))
    return DockerTools(docker, compose, buildx, installed)


def plugin_dirs(environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """The directories in which the docker CLI looks for plugins, the first it prefers first."""
    directory = config_dir(environ)
    return (*extra_plugin_dirs(directory), directory / "cli-plugins", *SYSTEM_PLUGIN_DIRS)


async def ensure(
    tools_dir: Path, *, progress: Progress, environ: Mapping[str, str] = os.environ, source: Source = DEBIAN
) -> DockerTools:
    """Install what the host lacks and make it known to its CLI; quick when nothing is missing.

    Safe to repeat, to run twice at once and to interrupt. ``tools_dir`` is created.

    Raises:
        UserError: apt is missing or fails, or a tool does not run on this host.
        OSError: a directory cannot be written.
    """
    tools = await detect(tools_dir, environ)
    if not tools.missing:
        return tools
    async with _exclusive(tools_dir, progress):
        wanted = (await detect(tools_dir, environ)).missing
        absent = [tool for tool in wanted if not _is_program(tools_dir / tool.place)]
        if absent:
            await _install(tools_dir, absent, progress, environ, source)
        for tool in wanted:
            if tool is not DOCKER:
                _link_plugin(tools_dir / tool.place, config_dir(environ) / "cli-plugins")
    return await detect(tools_dir, environ)


def superfluous(tools_dir: Path, environ: Mapping[str, str] = os.environ) -> list[tuple[Tool, Path]]:
    """The tools of ours that the host has itself by now, and where ours are."""
    docker = trio.run(_host_docker, environ)
    found = [(DOCKER, tools_dir / DOCKER.place)] if docker is not None else []
    for tool in PLUGINS:
        # Also in the user's own folder, where a link of ours may be, or a plugin of his.
        own, name = tools_dir / tool.place, Path(tool.place).name
        if any(
            _is_program(each / name) and not _points_to(each / name, own) for each in plugin_dirs(environ)
        ):
            found.append((tool, own))
    return [(tool, path) for tool, path in found if path.is_file()]


def remove(tools_dir: Path, tool: Tool, environ: Mapping[str, str] = os.environ) -> None:
    """Remove one tool of ours, and the link to it."""
    link = config_dir(environ) / "cli-plugins" / Path(tool.place).name
    if tool is not DOCKER and _points_to(link, tools_dir / tool.place):
        link.unlink()
    (tools_dir / tool.place).unlink(missing_ok=True)


def uninstall(tools_dir: Path, environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Remove every tool of ours and the links to them; returns what was removed. Others' are not touched."""
    removed: list[Path] = []
    for tool in PLUGINS:
        link = config_dir(environ) / "cli-plugins" / Path(tool.place).name
        if _points_to(link, tools_dir / tool.place):
            link.unlink()
            removed.append(link)
    for tool in (DOCKER, *PLUGINS):
        with suppress(FileNotFoundError):
            (tools_dir / tool.place).unlink()
            removed.append(tools_dir / tool.place)
    for folder in ("bin", "cli-plugins"):
        with suppress(OSError):  # absent, or something of the user's is in it
            (tools_dir / folder).rmdir()
    return tuple(removed)


# --- detection -------------------------------------------------------------------------------------


async def _host_docker(environ: Mapping[str, str]) -> Path | None:
    """The docker CLI on PATH. Podman's stand-in of the same name does not know contexts and is not one."""
    found = shutil.which("docker", path=environ.get("PATH", os.defpath))
    if found is None:
        return None
    output = await _run([found, "--version"], environ)
    return Path(found) if output is not None and output.startswith("Docker version") else None


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _points_to(link: Path, target: Path) -> bool:
    return link.is_symlink() and link.readlink() == target.absolute()


async def _run(argv: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """What a short command prints; None if it fails, hangs or cannot be run."""
    try:
        with trio.fail_after(TRIAL_TIMEOUT):
            done = await trio.run_process(
                argv, capture_stdout=True, capture_stderr=True, check=False, env=dict(environ)
            )
    except (OSError, trio.TooSlowError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


# --- installation ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Apt:
    """apt-get with a private state, and the directory its downloads go to."""

    argv: tuple[str, ...]
    downloads: Path
    environ: Mapping[str, str]

    async def run(self, *arguments: str, report: Callable[[float], None]) -> None:
        """Run a command of apt-get; ``report`` gets the part of the downloads that is done, from 0 to 1."""
        output: deque[str] = deque(maxlen=KEPT_LINES)
        start = partial(
            trio.run_process,
            [*self.argv, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=self.downloads,
            env=dict(self.environ, LC_ALL="C"),
        )
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(start)
            assert process.stdout is not None
            async for line in _lines(process.stdout):
                if status := re.match(r"dlstatus:[^:]*:([0-9.]+):", line):
                    report(min(float(status[1]) / 100, 1.0))
                else:
                    output.append(line)
        if process.returncode != 0:
            raise UserError(
                f"the docker CLI and its plugins could not be downloaded: {_complaint(output)}",
                hint="check the network (proxies are taken from apt's configuration), or " + INSTALL_HINT,
                exit_code=ExitCode.DEPENDENCY,
            )


async def _install(
    tools_dir: Path, tools: Sequence[Tool], progress: Progress, environ: Mapping[str, str], source: Source
) -> None:
    """Download, unpack, try and put in place ``tools``. Needs about 300 MB for a moment, 160 MB for good."""
    _require_apt(environ, source)
    names = ", ".join(tool.package for tool in tools)
    with _staging(tools_dir) as staging:
        apt = await _private_apt(staging, environ, source)
        label = "reading Debian's package lists"
        progress(label, 0.0)
        await apt.run("update", report=lambda part: progress(label, 0.3 * part))
        label = f"downloading {names}"
        progress(label, 0.3)
        packages = [tool.package for tool in tools]
        await apt.run("download", *packages, report=lambda part: progress(label, 0.3 + 0.5 * part))
        for index, tool in enumerate(tools):
            progress(f"unpacking {tool.package}", 0.8 + 0.2 * index / len(tools))
            await _unpack(tool, apt.downloads, staging / tool.name, tools_dir / tool.place, environ)
    progress(f"installed {names}", 1.0)


def can_install(environ: Mapping[str, str] = os.environ, source: Source = DEBIAN) -> bool:
    """Whether ``ensure`` has what it needs of this machine, but for the network."""
    try:
        _require_apt(environ, source)
    except UserError:
        return False
    return True


def _require_apt(environ: Mapping[str, str], source: Source) -> None:
    path = environ.get("PATH", os.defpath)
    if any(shutil.which(program, path=path) is None for program in ("apt-get", "dpkg", "dpkg-deb")):
        raise UserError(
            "the docker CLI or one of its plugins is missing, and without apt it cannot be fetched",
            hint=INSTALL_HINT,
            exit_code=ExitCode.DEPENDENCY,
        )
    if not source.keyring.is_file():
        raise UserError(
            f"Debian's archive keys ({source.keyring}) are missing, so that packages could not be verified",
            hint="sudo apt-get install debian-archive-keyring",
            exit_code=ExitCode.DEPENDENCY,
        )


async def _private_apt(staging: Path, environ: Mapping[str, str], source: Source) -> _Apt:
    """An apt that knows one release and nothing of the host but its proxies.

    The configuration is a file given by ``-c``, which apt reads after the host's own (apt.conf(5)): only so
    can the host's hooks be cleared.
    """
    for folder in ("state/lists/partial", "cache/archives/partial", "empty", "downloads"):
        (staging / folder).mkdir(parents=True)
    (staging / "state/status").touch()
    architecture = (await _run(["dpkg", "--print-architecture"], environ) or "").strip()
    (staging / "sources.list").write_text(source.lines(architecture))
    (staging / "apt.conf").write_text(
        f"""
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Architecture "{architecture}";
APT::Sandbox::User "root";  // that is: as the calling user, who alone may enter the directory
APT::Status-Fd "1";
APT::Update::Error-Mode "any";  // an unreachable mirror is an error, not a warning
Dir::State "{staging}/state";
Dir::State::status "{staging}/state/status";
Dir::Cache "{staging}/cache";
Dir::Etc::sourcelist "{staging}/sources.list";
Dir::Etc::sourceparts "{staging}/empty";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "{staging}/empty";
"""
    )
    return _Apt(("apt-get", "-c", f"{staging}/apt.conf", "-qq"), staging / "downloads", environ)


async def _unpack(
    tool: Tool, downloads: Path, folder: Path, destination: Path, environ: Mapping[str, str]
) -> None:
    """Take ``tool`` out of its downloaded package, see whether it runs, then give it its name."""
    archive = _archive(tool, downloads)
    program = folder / tool.member
    if await _run(["dpkg-deb", "-x", archive, str(folder)], environ) is None or not program.is_file():
        raise UserError(
            f"the package {tool.package} could not be unpacked",
            hint=f"is the disk of {destination.parent} full?",
            exit_code=ExitCode.RESOURCES,
        )
    if await _run([str(program), *tool.trial], environ) is None:
        raise UserError(
            f"{tool.name} from Debian's package {tool.package} does not run on this system",
            hint=INSTALL_HINT,
            exit_code=ExitCode.DEPENDENCY,
        )
    destination.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with program.open("rb") as file:
        os.fsync(file.fileno())  # a power cut after the rename must not leave a name without content
    os.replace(program, destination)


def _archive(tool: Tool, downloads: Path) -> str:
    """The path of a downloaded package; apt names it PACKAGE_VERSION_ARCHITECTURE.deb."""
    return str(next(downloads.glob(f"{tool.package}_*.deb")))


def _link_plugin(program: Path, folder: Path) -> None:
    """Let the docker CLI find a plugin of ours, unless there is one of that name in its folder."""
    link = folder / program.name
    if link.is_symlink() and not link.exists():
        link.unlink()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        link.symlink_to(program.absolute())


@contextmanager
def _staging(tools_dir: Path) -> Iterator[Path]:
    """A directory on the same filesystem that is gone afterwards, and so are those of killed processes."""
    for remains in tools_dir.glob(".staging-*"):
        shutil.rmtree(remains, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=tools_dir) as staging:
        yield Path(staging).absolute()


@asynccontextmanager
async def _exclusive(tools_dir: Path, progress: Progress) -> AsyncIterator[None]:
    """The directory for one process at a time; the lock goes with the process that holds it."""
    with _lock_file(tools_dir) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another agentctl that installs the docker tools", 0.0)
                await trio.sleep(LOCK_POLL)
        yield


def _lock_file(tools_dir: Path) -> IO[bytes]:
    tools_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return (tools_dir / ".lock").open("wb")


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[str]:
    """The lines of a process's output, without their ends."""
    pending = b""
    async for chunk in stream:
        *complete, pending = (pending + chunk).split(b"\n")
        for line in complete:
            yield line.decode(errors="replace")
    if pending:
        yield pending.decode(errors="replace")


def _complaint(output: Sequence[str]) -> str:
    """The sentence in apt's output that says what went wrong."""
    errors = [line.removeprefix("E: ") for line in output if line.startswith("E: ")]
    return (errors or [line for line in output if line.strip()] or ["no reason given"])[0 if errors else -1]
