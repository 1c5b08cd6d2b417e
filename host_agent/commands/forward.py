"""``forward``: what of the VM appears where on this machine, and the other way round."""

from __future__ import annotations

import time

import click

from host_agent import groups, state
from host_agent.client import RESTART_TIME, connected
from host_agent.commands.common import UP_INTERVAL, current_instance, json_option
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import (
    ChangePorts,
    ChangeSocketForwards,
    GetPortSettings,
    GetSocketForwards,
    PortSettings,
    SocketRows,
)


@click.group("forward")
def forward() -> None:
    """Choose what of the VM, or of the attached machine, appears where on this one, and the other way round."""


@forward.command("add")
@click.option("--reverse", is_flag=True, help="What listens on this machine appears in the VM.")
@click.option("--ignore", is_flag=True, help="These ports stay in the VM.")
@click.option("--static", is_flag=True, help="The port is there also while nothing in the VM listens.")
@click.option("--guest-ip", metavar="IP", help="Only what listens on this address of the VM, or on all.")
@click.argument("words", nargs=-1, required=True, metavar="FORWARD...")
def add_forwards(
    words: tuple[str, ...], reverse: bool, ignore: bool, static: bool, guest_ip: str | None
) -> None:
    """Forward ports and sockets, now and at each start.

    \b
    8080:80                       port 80 of the VM is localhost:8080
    0.0.0.0:443:443/tcp           other machines reach this one
    9000-9010:8000-8010           a range, to one of the same length
    /HOST/SOCKET:5432             a port of the VM is a unix socket here
    /HOST/SOCKET:/GUEST/SOCKET    so is a unix socket of the VM

    Every port is on localhost without this; rules are for those that are to be elsewhere, or not at all. The first
    that matches wins, and what is added last comes first.

    With --reverse a socket of this machine appears in the VM, where it belongs to your user; instead of
    /HOST/SOCKET there may be [ADDRESS:]PORT then: agentctl forward add --reverse
    $SSH_AUTH_SOCK:/run/ssh-agent.sock
    """
    from host_agent import rule_text, socket_rules

    of_sockets, of_ports = _sorted_words(words, reverse)
    if of_sockets and (ignore or static or guest_ip is not None):
        raise UserError(
            "--ignore, --static and --guest-ip are for ports", "add sockets by themselves", ExitCode.USAGE
        )
    rules = [rule_text.from_words(word, guest_ip=guest_ip, ignore=ignore, static=static) for word in of_ports]
    sockets = [socket_rules.parse(word, reverse) for word in of_sockets]
    _show_forwards(_change_forwards(current_instance(), ChangePorts(rules), ChangeSocketForwards(sockets)))


@forward.command("rm")
@click.option("--reverse", is_flag=True, help="What was added with --reverse.")
@click.argument("words", nargs=-1, required=True, metavar="FORWARD...")
def remove_forwards(words: tuple[str, ...], reverse: bool) -> None:
    """Forward them no longer; written as they were added."""
    from host_agent import rule_text, socket_rules

    of_sockets, of_ports = _sorted_words(words, reverse)
    sockets = [socket_rules.parse(word, reverse) for word in of_sockets]
    settings, _ = _list_forwards(current_instance())
    named = [rule_text.find(settings.rules, word) for word in of_ports]
    rules = list(dict.fromkeys(rule for found in named for rule in found))
    change = ChangeSocketForwards(remove=sockets)
    _show_forwards(_change_forwards(current_instance(), ChangePorts(remove=rules), change))


@forward.command("list")
@json_option
def list_forwards(as_json: bool) -> None:
    """Show what was added; how the ports are doing is in: agentctl ports."""
    _show_forwards(_list_forwards(current_instance()), as_json=as_json)


def _sorted_words(words: tuple[str, ...], reverse: bool) -> tuple[list[str], list[str]]:
    """Those about sockets of the guest, and those about its ports."""
    of_sockets = [word for word in words if reverse or ":/" in word]
    return of_sockets, [word for word in words if word not in of_sockets]


def _show_forwards(listed: tuple[PortSettings, SocketRows], *, as_json: bool = False) -> None:
    from host_agent import show

    (show.rules_json if as_json else show.rules)(*listed)


def _list_forwards(paths: InstancePaths) -> tuple[PortSettings, SocketRows]:
    from host_agent import forwards_at_rest

    if state.is_locked(paths.lock):
        return groups.run(_forwards_of_running, paths)
    return forwards_at_rest.listed(paths)


def _change_forwards(
    paths: InstancePaths, ports: ChangePorts, sockets: ChangeSocketForwards
) -> tuple[PortSettings, SocketRows]:
    """Now and for each start; or for the next one, if the instance does not run."""
    from host_agent import forwards_at_rest

    Home.find().ensure()
    paths.ensure()
    while True:
        if state.is_locked(paths.lock):
            return groups.run(_change_forwards_of_running, paths, ports, sockets)
        with state.locked(paths.up_lock) as ours:
            if ours and not state.is_locked(paths.lock):
                return forwards_at_rest.change(paths, ports, sockets)
        time.sleep(UP_INTERVAL)  # it is just being started


async def _forwards_of_running(paths: InstancePaths) -> tuple[PortSettings, SocketRows]:
    async with connected(paths, patience=RESTART_TIME) as link:
        return await link.request(GetPortSettings()), await link.request(GetSocketForwards())


async def _change_forwards_of_running(
    paths: InstancePaths, ports: ChangePorts, sockets: ChangeSocketForwards
) -> tuple[PortSettings, SocketRows]:
    async with connected(paths, patience=RESTART_TIME) as link:
        if ports.add or ports.remove:
            await link.request(ports)
        if sockets.add or sockets.remove:
            await link.request(sockets)
    return await _forwards_of_running(paths)
