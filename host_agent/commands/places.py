"""The table of all commands. It imports nothing, so that whoever names a command may look it up."""

from __future__ import annotations

from typing import Final

#: Every command and where it is, below ``host_agent.commands``.
PLACES: Final = {
    "up": "lifecycle:up",
    "start": "lifecycle:start",
    "stop": "lifecycle:stop",
    "restart": "lifecycle:restart",
    "delete": "lifecycle:delete",
    "attach": "attach:attach",
    "detach": "attach:detach",
    "status": "status:status",
    "list": "instances:list_instances",
    "watch": "watch:watch",
    "top": "top:top",
    "ports": "ports:ports",
    "open": "ports:open_port",
    "tunnel": "ports:tunnel",
    "forward": "forward:forward",
    "mounts": "mounts:list_mounts",
    "view": "view:view",
    "exec": "run:execute",
    "shell": "run:shell",
    "cp": "copy:copy_files",
    "ssh-config": "ssh:ssh_config",
    "ssh-proxy": "ssh:ssh_proxy",
    "logs": "logs:logs",
    "env": "docker:env",
    "doctor": "doctor:doctor",
    "config": "config:config",
    "disk": "disk:disk",
    "image": "images:image",
    "prune": "images:prune",
    "completion": "about:completion",
    "version": "about:version",
    "autostart": "host_side:autostart",
    "docker-sock": "host_side:docker_sock",
}

#: Those that are about all instances, or none; all others are about the one that ``--instance`` names.
OF_NO_INSTANCE: Final = frozenset({"attach", "completion", "detach", "image", "list", "prune", "version"})
