"""This machine: its kind, the folder for what is ours, and whether it has what the VM was asked to have."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from host_agent import sizes
from host_agent.configuration import config as configuration
from host_agent.configuration.config import GIB, MIN_MEMORY, Host, InstanceConfig
from host_agent.disk_room import DiskRoom, allocated
from host_agent.doctor.finding import Finding, advice, of_error, ok, problem
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from provision.errors import ProvisionError
from provision.image import BUILD_SPACE
from provision.recipe import debian_architecture


def system() -> Finding:
    described = f"{platform.system()} {platform.release()} on {platform.machine()}, Python {platform.python_version()}"
    try:
        architecture = debian_architecture()
    except ProvisionError as error:
        return of_error("system", error)
    if platform.system() != "Linux" or architecture != "amd64":
        return advice("system", f"{described}: not tested on such machines", "tell us how it goes")
    return ok("system", described)


def home(home: Home, paths: InstancePaths) -> Finding:
    """Whether the folders can be made, or are ours. Nothing is made."""
    elsewhere = "set AGENTCTL_HOME to a folder of your own"
    try:
        paths.check_length()
    except UserError as error:
        return of_error("home", error)
    there = existing(paths.directory)
    try:
        owner = there.stat().st_uid
    except OSError as error:
        return problem("home", f"{there} cannot be used: {error.strerror}", elsewhere)
    if there.is_relative_to(home.root) and owner != os.geteuid():
        return problem("home", f"{there} belongs to another user (uid {owner})", elsewhere)
    if not os.access(there, os.W_OK | os.X_OK):
        return problem("home", f"{home.root} cannot be made: you may not write to {there}", elsewhere)
    return ok("home", str(home.root))


def configured(paths: InstancePaths, host: Host) -> tuple[InstanceConfig, list[Finding]]:
    """What the instance is to be, or the default if that cannot be read; and what of it this machine cannot give."""
    try:
        config = configuration.load(paths, host)
    except UserError as error:
        return InstanceConfig.default(host), [of_error("configuration", error)]
    try:
        configuration.check(config, host)
    except UserError as error:
        return config, [of_error("configuration", error)]
    return config, []


def memory(config: InstanceConfig, *, running: bool) -> Finding:
    free = psutil.virtual_memory().available
    asked = f"{config.cpus} cpus and {sizes.show(config.memory)} of memory for the VM"
    if running or free >= config.memory:
        return ok("memory", asked)
    less = max(MIN_MEMORY, free // 2 // MIN_MEMORY * MIN_MEMORY)
    return advice(
        "memory",
        f"{asked}, and {sizes.show(free)} are free now: this machine may begin to swap",
        f"close something, or: agentctl up --memory {sizes.flag(less)}",
    )


def disk(config: InstanceConfig, home: Home, paths: InstancePaths, *, has_image: bool) -> Iterator[Finding]:
    where = existing(home.images if not has_image else paths.directory)
    free = shutil.disk_usage(where).free
    to_start = GIB if has_image else BUILD_SPACE
    what = "to start" if has_image else "to build its image"
    room = "free some space, or set AGENTCTL_HOME to a folder on a larger disk"
    if free < to_start:
        message = f"{sizes.show(free)} are free where {where} is; the VM needs {sizes.show(to_start)} {what}"
        yield problem("disk", message, room, ExitCode.RESOURCES)
        return
    taken = allocated(paths.data_disk)
    grows = max(0, config.disk - taken)
    if free < DiskRoom(config.disk, taken, free).mark:
        message = f"{sizes.show(free)} are free, and the VM's disk may take {sizes.show(grows)} more: if it fills up,"
        yield advice("disk", f"{message} the VM waits until there is room", room)
        return
    yield ok(
        "disk", f"{sizes.show(taken)} of the VM's {sizes.show(config.disk)} taken, {sizes.show(free)} free"
    )


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
