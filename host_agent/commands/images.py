"""``image list``, ``image prune`` and ``image build``; and ``prune``, which is for all that nobody uses."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click

from host_agent.commands.common import current_instance, json_option
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home

if TYPE_CHECKING:
    from host_agent.disuse import Unused

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.group("image")
def image() -> None:
    """See what the VMs are made of, build it ahead of the first start, and remove what is old."""


@image.command("list")
@json_option
def list_images(as_json: bool) -> None:
    """Show the images that were built, and who uses them."""
    from host_agent import disuse, show

    stored = disuse.stored_images(Home.find())
    if not as_json:
        show.images(stored)
        return
    show.as_json(
        [
            {
                "image": each.path.name,
                "path": str(each.path),
                "size": each.size,
                "current": each.current,
                "used_by": list(each.used_by),
                "damaged": each.manifest is None,
                "suite": each.manifest.suite if each.manifest else "",
                "architecture": each.manifest.architecture if each.manifest else "",
                "kernel": each.manifest.kernel_release if each.manifest else "",
                "built_at": each.manifest.built_at if each.manifest else 0,
            }
            for each in stored
        ]
    )


@image.command("build")
@json_option
def build_image(as_json: bool) -> None:
    """Build the image that the next start of the instance needs, if it is not there yet. Takes some minutes."""
    from host_agent import show
    from host_agent.configuration import config as configuration
    from host_agent.progress import progress
    from provision import image as images
    from provision import recipe as recipes
    from provision.errors import ProvisionError

    home = Home.find()
    home.ensure()
    config = configuration.load(current_instance(), configuration.Host.measure())
    recipe, began = recipes.load(runtime=config.runtime), time.monotonic()
    there = images.find(home.images, recipe.digest) is not None
    try:
        with progress() as report:
            built = images.ensure(home.images, recipe, report)
    except ProvisionError as error:
        raise UserError(error.message, error.hint, ExitCode.RESOURCES) from None
    if as_json:
        show.as_json({"image": recipe.digest, "path": str(built.directory), "built": not there})
    elif there:
        show.err().print(f"image {recipe.digest} is there already")
    else:
        show.err().print(f"image {recipe.digest} is built, in {time.monotonic() - began:.0f} s")


@image.command("prune")
@yes_option
@json_option
def prune_images(yes: bool, as_json: bool) -> None:
    """Remove images of older versions, and what builds that failed have left.

    What the next start takes stays, and so does what an instance runs on.
    """
    from host_agent import disuse

    _prune(disuse.unused_images(Home.find()), yes=yes, as_json=as_json)


@click.command()
@yes_option
@json_option
def prune(yes: bool, as_json: bool) -> None:
    """Remove what nobody uses: old images, remains of builds, docker tools that this machine has itself.

    Instances and their disks stay; see "delete". For what is inside a VM there is: docker system prune
    """
    from host_agent import disuse

    _prune(disuse.unused(Home.find(), os.environ), yes=yes, as_json=as_json)


def _prune(unused: list[Unused], *, yes: bool, as_json: bool) -> None:
    from host_agent import show, sizes
    from provision.errors import ProvisionError

    total = sizes.show(sum(each.size for each in unused))
    if unused and not as_json:
        show.unused(unused)
    if unused and not yes:
        if not sys.stdin.isatty():
            raise UserError(f"this would remove {total}", "say so with --yes", ExitCode.USAGE)
        if not click.confirm(f"Remove {total}?", err=True):
            show.err().print("nothing was removed")
            sys.exit(ExitCode.GENERAL)
    for each in unused:
        try:
            each.remove()
        except ProvisionError as error:
            raise UserError(error.message, error.hint) from None
    if as_json:
        show.as_json([{"what": each.what, "path": str(each.path), "size": each.size} for each in unused])
    else:
        show.err().print(f"removed {total}" if unused else "there is nothing to remove")
