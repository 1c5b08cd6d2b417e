"""``doctor``: what is in the way of the VM on this machine."""

from __future__ import annotations

import sys

import click

from host_agent import groups
from host_agent.commands.common import current_instance, json_option
from host_agent.paths import Home


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Look for what is in the way of the VM on this machine, or makes it slow, and say what to do.

    Exit status 0 if all works, however slowly; else that of the first problem, as "up" would have it.
    """
    from host_agent import show
    from host_agent.doctor.examination import examine

    home = Home.find()
    diagnosis = groups.run(examine, home, current_instance())
    (show.diagnosis_json if as_json else show.diagnosis)(diagnosis)
    if diagnosis.exit_code:
        sys.exit(diagnosis.exit_code)
