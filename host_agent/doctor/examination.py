"""All checks, in the order in which ``up`` would come upon what they look at."""

from __future__ import annotations

from host_agent import state
from host_agent.configuration.config import Host
from host_agent.doctor import attached, folders, instance, kernel, machine, programs
from host_agent.doctor.finding import Diagnosis, Finding
from host_agent.paths import Home, InstancePaths
from host_agent.remote import record


async def examine(home: Home, paths: InstancePaths) -> Diagnosis:
    """Takes some seconds at the most, but where an accelerator has to be probed, or a disk does not answer."""
    if (machine_there := record.load(paths)) is not None:
        return Diagnosis.of(await attached.examine(home, paths, machine_there))
    told = await instance.ask(paths)
    running = told is not None
    last = state.load(paths.state)
    config, refused = machine.configured(paths, Host.measure())
    image, of_image = programs.image(home, config.runtime)
    found: list[Finding] = [machine.system(), machine.home(home, paths), *refused]
    if not refused:
        found.append(machine.memory(config, running=running))
    found += machine.disk(config, home, paths, has_image=image is not None)
    qemu, of_qemu = await programs.qemu()
    found += [*of_qemu, *programs.programs()]
    if qemu is not None:
        found.append(await programs.accelerator(qemu, config, image, home, last, running=running))
        if not isinstance(told, instance.Told):
            found.append(await programs.shared_memory(qemu, config))
    found += [*of_image, *await programs.docker(home, paths), *kernel.check()]
    if isinstance(told, instance.Told):
        found += [*await folders.running(told.mounts), *instance.running(told)]
    else:
        found += await folders.at_rest(config.mounts)
        found.append(instance.at_rest(last) if told is None else told)
    return Diagnosis.of(found)
