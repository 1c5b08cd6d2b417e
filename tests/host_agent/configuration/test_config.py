from __future__ import annotations

import json
import os
import stat
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from host_agent import sizes
from host_agent.configuration import config
from host_agent.configuration import keys as config_keys
from host_agent.configuration.config import GIB, MIB, Host, InstanceConfig, Wishes
from host_agent.errors import ExitCode, UserError
from host_agent.network_settings import NetworkSettings
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from protocol.api import MountSpec, PortRule, PortSettings, Proto, SocketForward

HOST = Host(cpus=8, memory=16 * GIB)
HOME = MountSpec("/home/someone", "/home/someone", real_path="/disk/someone")
ASKED = InstanceConfig(
    cpus=4, memory=4 * GIB, disk=60 * GIB, accelerator="auto", identity=str(uuid.uuid4()), mounts=(HOME,)
)


def test_the_first_configuration_is_one_that_the_host_can_honour() -> None:
    for cpus in (1, 2, 64):
        for memory in (GIB, 2 * GIB, 7 * GIB + 12345, 512 * GIB):
            host = Host(cpus, memory)
            chosen = InstanceConfig.default(host)
            config.check(chosen, host)
            assert chosen.memory % MIB == 0
            assert chosen.cpus <= 4
            assert chosen.memory <= 4 * GIB


def test_the_host_is_measured() -> None:
    host = Host.measure()
    assert host.cpus == os.cpu_count()
    assert host.memory > 256 * MIB


# --- the file --------------------------------------------------------------------------------------


def lines_of(instance: InstancePaths) -> list[str]:
    return instance.config.read_text().splitlines()


RULES = (
    PortRule(guest_port=80, ports=1, host_port=8080),
    PortRule(Proto.UDP, "0.0.0.0", True, 1, 100, host_port=1, ignore=True),
)
EVERYTHING = replace(
    ASKED,
    cpus=2,
    memory=3 * GIB + MIB,
    disk=61 * GIB + 512,
    accelerator="tcg",
    bulk=False,
    mounts=(
        MountSpec("/srv/a", "/a", read_only=True),
        MountSpec("/srv/b", "/b", host_locks=True, real_path="/disk/b"),
        MountSpec("/srv/with,locks=host", "/srv/with,locks=host"),
        HOME,
    ),
    rules=RULES,
    lan=True,
    privileged_offset=10000,
    sockets=(SocketForward("/run/db", "localhost:5432", reverse=True), SocketForward("/g", "/h")),
    network=NetworkSettings(hosts=(("db.test", "192.0.2.7"),), proxies="none", certificates=()),
)


@pytest.mark.parametrize("chosen", [ASKED, EVERYTHING])
def test_a_configuration_is_what_was_saved(instance: InstancePaths, chosen: InstanceConfig) -> None:
    config.save(instance, chosen)
    kept = config.load(instance, HOST)
    assert kept == chosen
    # It is not compared: two mounts that differ in nothing else are equal.
    assert [spec.real_path for spec in kept.mounts] == [spec.real_path for spec in chosen.mounts]
    assert kept.ports == PortSettings(list(chosen.rules), chosen.lan, chosen.privileged_offset)


def test_without_a_file_there_is_a_default_with_an_identity_of_its_own(instance: InstancePaths) -> None:
    first, second = (config.load(instance, HOST) for _ in range(2))
    assert replace(first, identity="") == replace(second, identity="")
    assert uuid.UUID(first.identity) != uuid.UUID(second.identity)
    assert not instance.config.exists()


def test_what_is_left_out_is_as_it_is_by_default_and_is_not_written(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for text in ("", "# nothing\n", "cpus: 2\n", "ports:\n"):
        instance.config.write_text(text)
        chosen = config.load(instance, Host.measure())
        default = replace(InstanceConfig.default(Host.measure()), identity=chosen.identity)
        assert chosen == replace(default, cpus=2 if "cpus" in text else default.cpus)
        assert chosen.mounts == (MountSpec("/home/someone", "/home/someone"),)
        config.save(instance, chosen)
        assert instance.config.read_text() == text


def test_a_list_of_which_every_line_was_taken_out_is_empty(instance: InstancePaths) -> None:
    instance.config.write_text("mounts:\nsockets:\nports:\n  rules:\n")
    chosen = config.load(instance, HOST)
    assert (chosen.mounts, chosen.sockets, chosen.rules) == ((), (), ())


def test_what_is_not_for_people_is_not_in_the_file(instance: InstancePaths) -> None:
    config.save(instance, EVERYTHING)
    text = instance.config.read_text()
    assert ASKED.identity not in text
    assert "/disk" not in text
    # A folder that is another one now is not where the one before it was.
    instance.config.write_text(text.replace("/home/someone", "/home/other"))
    changed = config.load(instance, HOST)
    assert changed.identity == ASKED.identity
    assert [spec.real_path for spec in changed.mounts] == ["", "/disk/b", "", ""]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"identity": "me", "real_paths": {}}', b"\xff"])
def test_a_damaged_record_is_named_and_not_guessed_at(instance: InstancePaths, content: bytes) -> None:
    config.save(instance, ASKED)
    instance.machine.write_bytes(content)
    with pytest.raises(UserError, match=f"{instance.machine} is damaged") as caught:
        config.load(instance, HOST)
    assert f"rm {instance.machine}" in caught.value.hint
    assert caught.value.exit_code is ExitCode.USAGE


def test_comments_and_what_was_not_asked_for_stay_as_they_are(instance: InstancePaths) -> None:
    config.save(instance, ASKED)
    before = "# mine\n" + instance.config.read_text().replace("cpus: 4", "cpus:   4  # all of them")
    instance.config.write_text(before)
    config.save(instance, replace(config.load(instance, HOST), memory=2 * GIB, rules=RULES[:1]))
    after = instance.config.read_text()
    new = (
        "  rules:\n    - proto: any\n      guest_port: 80\n      host_ip: localhost\n      host_port: 8080\n"
    )
    assert after == before.replace("memory: 4GiB", "memory: 2GiB").replace("  rules: []\n", new)
    config.save(instance, config.load(instance, HOST))
    assert instance.config.read_text() == after


def test_an_entry_of_a_list_keeps_its_comment_when_another_comes_or_goes(instance: InstancePaths) -> None:
    first = "  # of the web\n  - {guest_port: 80, host_port: 8080}  # here\n"
    second = "\n  # of the database\n  - guest_port: [5432, 5433]\n    ignore: true\n"
    instance.config.write_text(f"ports:\n  rules:\n{first}{second}")
    chosen = config.load(instance, Host.measure())
    config.save(instance, replace(chosen, rules=(RULES[1], *chosen.rules)))
    assert first + second in instance.config.read_text()
    config.save(instance, replace(chosen, rules=chosen.rules[1:]))
    assert instance.config.read_text() == f"ports:\n  rules:\n{second}"


def test_a_new_instance_begins_as_the_users_template(instance: InstancePaths) -> None:
    instance.home.template.write_text("# of all my instances\ncpus: 3\n")
    chosen = config.load(instance, HOST)
    assert chosen.cpus == 3
    config.save(instance, replace(chosen, lan=True))
    assert lines_of(instance)[:2] == ["# of all my instances", "cpus: 3"]
    assert config.load(instance, HOST) == replace(chosen, lan=True)
    # What it says later is for those that come later.
    instance.home.template.write_text("cpuss: 4\n")
    assert config.load(instance, HOST).cpus == 3
    with pytest.raises(UserError, match=r"default\.yaml line 1: cpuss is no key; did you mean cpus"):
        config.load(instance.home.instance("other"), HOST)


def test_a_path_of_this_machine_may_begin_in_the_home(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    text = "sockets:\n- guest: /g\n  host: ~/h\nports:\n  rules:\n  - {guest_port: 80, host_socket: ~/s}\n"
    instance.config.write_text(text)
    chosen = config.load(instance, Host.measure())
    assert chosen.sockets == (SocketForward("/g", "/home/someone/h"),)
    assert chosen.rules[0].host_socket == "/home/someone/s"
    config.save(instance, replace(chosen, sockets=(*chosen.sockets, SocketForward("/i", "/j"))))
    assert instance.config.read_text() == text.replace("host: ~/h\n", "host: ~/h\n- guest: /i\n  host: /j\n")


def test_editors_find_the_schema_in_the_first_line(instance: InstancePaths) -> None:
    config.save(instance, ASKED)
    schema = json.loads(instance.home.config_schema.read_text())
    assert lines_of(instance)[0] == f"# yaml-language-server: $schema={instance.home.config_schema}"
    assert schema == config_keys.schema()


def test_a_file_that_is_a_symlink_stays_one(instance: InstancePaths, tmp_path: Path) -> None:
    dotfile = tmp_path / "vm.yaml"
    dotfile.write_text("cpus: 2\n")
    dotfile.chmod(0o640)
    instance.config.symlink_to(dotfile)
    config.save(instance, replace(config.load(instance, HOST), cpus=3))
    assert instance.config.is_symlink()
    assert dotfile.read_text() == "cpus: 3\n"
    assert stat.S_IMODE(dotfile.stat().st_mode) == 0o640


def test_what_one_change_would_change_twice_is_left_to_its_author(instance: InstancePaths) -> None:
    text = "memory: &size 4GiB\ndisk: *size\n"
    instance.config.write_text(text)
    chosen = config.load(instance, Host.measure())
    assert (chosen.memory, chosen.disk) == (4 * GIB, 4 * GIB)
    config.save(instance, replace(chosen, disk=60 * GIB))
    assert instance.config.read_text() == "memory: &size 4GiB\ndisk: 60GiB\n"
    instance.config.write_text(text)
    with pytest.raises(UserError) as caught:
        config.save(instance, replace(chosen, memory=8 * GIB))
    assert "edit it: agentctl config edit" in caught.value.hint
    assert instance.config.read_text() == text


def test_an_agent_does_not_wait_long_for_a_command_that_stands_still(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.save(instance, ASKED)
    monkeypatch.setattr(config, "AGENT_PATIENCE", 0.01)
    with config.locked(instance.config_lock):
        with pytest.raises(OSError, match="another command is changing"):
            config.save_changes(instance, ASKED, lan=True)
        with pytest.raises(UserError) as caught, config.locked(instance.config_lock, 0.01):
            pass
    assert caught.value.exit_code is ExitCode.BUSY
    assert not config.load(instance, HOST).lan


def test_two_who_change_the_file_do_so_one_after_the_other(instance: InstancePaths) -> None:
    config.save(instance, ASKED)
    late = threading.Thread(target=config.save, args=(instance, replace(ASKED, lan=True)))
    with config.locked(instance.config_lock):
        late.start()
        late.join(0.05)
        assert late.is_alive()
    late.join(10)
    assert config.load(instance, HOST).lan


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- a\n", ": the file is a list; it is keys with their values"),
        (b"cpus: [\n", " line 2: this is not YAML: expected the node content"),
        (b"\x00" * 100, " line 1: this is not YAML"),
        (b"cpus: 1\nx: \xff\n", " line 2: this is not UTF-8 text"),
        (b"cpus: 1\ncpus: 2\n", " line 2: cpus is there twice; it is in line 1, too"),
        (b'cpus: "4"\n', ' line 1: cpus is "4"; it is a whole number'),
        (b"cpus:\n", " line 1: cpus is empty; it is a whole number"),
        (b"\n\nmemory: lots\n", ' line 3: memory is "lots"; it is a size like 4GiB or 512MiB'),
        (b"ports: {lan: no}\n", ' line 1: ports.lan is "no"; it is true or false'),
        (b"cpuss: 1\nmem: 4\n", " line 1: cpuss is no key; did you mean cpus? (and 1 more: agentctl config "),
        (b"# a\nlan: true\n", " line 2: lan is no key; did you mean ports.lan?"),
        (
            b"accelerator: KVM\n",
            ' line 1: accelerator is "KVM"; it is one of auto, kvm, hvf, tcg; did you mean',
        ),
        (
            b"ports:\n  lan: true\n  privileged_offset: 7\n",
            " line 3: ports.privileged_offset: the privileged",
        ),
        (
            b"ports:\n  rules:\n  - guest_port: 1\n  - guest_prot: 2\n",
            " line 4: ports.rules entry 2: guest_prot is",
        ),
        (b"mounts:\n- /srv:/etc\n", " line 1: mounts: /etc cannot be a mount"),
        (
            b"mounts:\n- ~\n- host: /a\n",
            " line 3: mounts entry 2: host is no key of a mount; did you mean host_p",
        ),
        (b"sockets:\n- {guest: /g}\n", " line 2: sockets entry 1 has no host"),
        (
            b"sockets:\n- {guest: /g, host: /a}\n- {guest: /x, host: /a}\n",
            " line 1: sockets: two sockets cannot",
        ),
        (
            b"network:\n  hosts:\n    db.test: here and there\n",
            " line 3: network: db.test is 'here and there', which",
        ),
        (
            b"sockets: [{guest: /g, host: /a}]\nports: {rules: [{guest_port: 80, host_socket: /a}]}\n",
            " line 1: sockets: a port and a socket of the VM cannot both be at /a",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line_and_nothing_is_guessed(
    instance: InstancePaths, content: bytes, said: str
) -> None:
    instance.config.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load(instance, HOST)
    assert caught.value.message.startswith(f"{instance.config}{said}")
    assert caught.value.hint == "correct it: agentctl config edit"
    assert caught.value.exit_code is ExitCode.USAGE
    with pytest.raises(UserError):
        config.save(instance, ASKED)
    assert instance.config.read_bytes() == content


def test_all_mistakes_are_found_at_once_in_the_order_of_the_file() -> None:
    found = config.examined(b"bulk: maybe\nports:\n  lam: true\n  lan: 3\ncpus: x\n", HOST)
    assert isinstance(found, list)
    assert [mistake.line for mistake in found] == [1, 3, 4, 5]


# --- flags -----------------------------------------------------------------------------------------


def test_flags_of_ports_are_remembered_until_others_are_given() -> None:
    chosen = Wishes(lan=True, privileged_offset=10000).applied(ASKED)
    assert (chosen.lan, chosen.privileged_offset) == (True, 10000)
    assert Wishes().applied(chosen) == chosen
    assert Wishes(lan=False, privileged_offset=0).applied(chosen) == ASKED


def test_shared_memory_is_usual_and_its_absence_remembered(instance: InstancePaths) -> None:
    without = Wishes(bulk=False).applied(ASKED)
    assert (ASKED.bulk, without.bulk) == (True, False)
    config.save(instance, without)
    assert Wishes().applied(config.load(instance, HOST)).bulk is False
    assert Wishes(bulk=True).applied(config.load(instance, HOST)).bulk is True


def test_flags_change_what_they_name() -> None:
    wishes = Wishes(cpus=2, disk=80 * GIB)
    assert wishes.applied(ASKED) == replace(ASKED, cpus=2, disk=80 * GIB)
    assert Wishes().applied(ASKED) == ASKED
    # A zero is something that was asked for, to be refused and not to be overlooked.
    assert Wishes(cpus=0).applied(ASKED).cpus == 0
    assert Wishes(mounts=()).applied(ASKED).mounts == ()


@pytest.mark.parametrize(
    ("asked", "sentence", "hint"),
    [
        (replace(ASKED, cpus=0), "a VM needs at least 1 cpu; asked for 0", "--cpus 1 to 8"),
        (replace(ASKED, cpus=-3), "a VM needs at least 1 cpu; asked for -3", "--cpus 1 to 8"),
        (replace(ASKED, cpus=9), "this machine has 8 cpus; asked for 9", "--cpus 1 to 8"),
        (
            replace(ASKED, memory=100 * MIB),
            "a VM needs at least 512 MiB of memory; asked for 100 MiB",
            "--memory 512MiB to 15872MiB",
        ),
        (
            replace(ASKED, memory=64 * GIB),
            "this machine has 16 GiB of memory and needs some itself; asked for 64 GiB",
            "--memory 512MiB to 15872MiB",
        ),
        (replace(ASKED, disk=GIB), "the disk needs at least 2 GiB; asked for 1 GiB", "--disk 2GiB or more"),
        (replace(ASKED, disk=1 << 60), "the disk can have 15 TiB; asked for", "--disk 2GiB to 15TiB"),
        (replace(ASKED, accelerator="warp"), "'warp' is not an accelerator", "one of auto, kvm, hvf, tcg"),
    ],
)
def test_what_the_host_cannot_honour_is_refused(asked: InstanceConfig, sentence: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        config.check(asked, HOST)
    assert caught.value.message.startswith(sentence)
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_code is ExitCode.RESOURCES


def test_the_limits_that_a_hint_names_are_allowed() -> None:
    for memory in ("512MiB", "15872MiB"):
        config.check(replace(ASKED, memory=sizes.parse(memory)), HOST)
    config.check(replace(ASKED, cpus=8, disk=config.MAX_DISK), HOST)


def disk_of(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_a_disk_never_shrinks(tmp_path: Path) -> None:
    disk = disk_of(tmp_path / "data.img", 60 * GIB + 512)
    with pytest.raises(UserError, match="never shrinks; asked for 60 GiB") as caught:
        config.check_disk(ASKED, disk)
    assert caught.value.exit_code is ExitCode.RESOURCES
    # The size in the hint is one that would be taken.
    size = caught.value.hint.removeprefix("--disk ").split()[0]
    config.check_disk(replace(ASKED, disk=sizes.parse(size)), disk)


def test_a_disk_may_grow_or_be_new(tmp_path: Path) -> None:
    config.check_disk(ASKED, disk_of(tmp_path / "data.img", 2 * GIB))
    config.check_disk(ASKED, tmp_path / "none.img")


def test_a_full_host_is_noticed_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100 * MIB

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match="100 MiB are free where") as caught:
        config.check_disk(ASKED, tmp_path / "data.img")
    assert caught.value.exit_code is ExitCode.RESOURCES


def test_a_disk_that_was_kept_is_as_large_as_it_is(tmp_path: Path) -> None:
    disk = disk_of(tmp_path / "data.img", 100 * GIB)
    assert config.with_kept_disk(ASKED, Wishes(), disk).disk == 100 * GIB
    # Asked for by name, a smaller one is refused by check_disk instead of being overlooked.
    assert config.with_kept_disk(ASKED, Wishes(disk=60 * GIB), disk).disk == 60 * GIB
    assert config.with_kept_disk(ASKED, Wishes(), tmp_path / "none.img") == ASKED


# --- of an instance that runs ----------------------------------------------------------------------


def test_what_cannot_be_of_ports_is_refused() -> None:
    with pytest.raises(UserError, match="the privileged offset is 7") as caught:
        config.check_ports(PortSettings(privileged_offset=7))
    assert caught.value.exit_code is ExitCode.USAGE


def test_changes_of_a_running_instance_leave_the_rest_of_the_file_as_people_edited_it(
    instance: InstancePaths,
) -> None:
    edited = replace(ASKED, network=NetworkSettings(proxies="none"), cpus=2)
    config.save(instance, edited)
    assert config.save_changes(instance, ASKED, lan=True) == replace(ASKED, lan=True)
    assert config.load(instance, HOST) == replace(edited, lan=True)


def test_changes_are_not_saved_over_a_file_that_is_just_being_edited(instance: InstancePaths) -> None:
    instance.config.write_text("cpus: [")
    with pytest.raises(OSError, match="this is not YAML"):
        config.save_changes(instance, ASKED, lan=True)
    assert instance.config.read_text() == "cpus: ["
    instance.config.unlink()
    config.save_changes(instance, ASKED, lan=True)
    assert config.load(instance, HOST) == replace(ASKED, lan=True)


def test_a_port_and_a_socket_of_the_vm_are_not_at_one_path(instance: InstancePaths) -> None:
    port = PortRule(guest_port=80, ports=1, host_port=80, host_socket="/a")
    sockets = (SocketForward("/g", "/b"), SocketForward("/g", "/a", reverse=True))
    config.save(instance, replace(ASKED, rules=(port,), sockets=sockets))
    kept = config.load(instance, HOST)
    message = "a port and a socket of the VM cannot both be at /a"
    with pytest.raises(UserError, match=message):
        config.save_changes(instance, kept, sockets=(*sockets, SocketForward("/g", "/a")))
    with pytest.raises(UserError, match=message):
        config.check_sockets(replace(kept, sockets=(SocketForward("/g", "/a"),)))
    assert config.load(instance, HOST) == kept


@pytest.mark.parametrize("chosen", [ASKED, EVERYTHING])
def test_an_agent_that_comes_after_a_killed_one_goes_on_in_spite_of_a_slip_in_the_file(
    instance: InstancePaths, chosen: InstanceConfig
) -> None:
    config.save(instance, chosen)
    assert config.load_running(instance, HOST) == (chosen, "")
    instance.config.write_text("cpus: [\n")
    running, damage = config.load_running(instance, HOST)
    assert running == chosen == config.load_kept(instance.running_config)
    assert [spec.real_path for spec in running.mounts] == [spec.real_path for spec in chosen.mounts]
    assert damage.startswith(f"{instance.config} line 2: this is not YAML")
    assert damage.endswith("; the VM goes on with what it was started with")
    for content in ("{", "[]", "{}", '{"config": {"cpus": "x"}}', '{"config": {}}'):
        instance.running_config.write_text(content)
        assert config.load_kept(instance.running_config) is None
        with pytest.raises(UserError, match=r"config\.yaml line 2"):
            config.load_running(instance, HOST)


def test_a_file_that_cannot_be_read_does_not_end_what_runs(instance: InstancePaths) -> None:
    config.save(instance, ASKED)
    config.load_running(instance, HOST)
    instance.config.unlink()
    instance.config.mkdir()
    running, damage = config.load_running(instance, HOST)
    assert (running, damage.startswith(f"{instance.config} cannot be read: Is a directory")) == (ASKED, True)
    with pytest.raises(OSError, match="cannot be read"):
        config.save_changes(instance, ASKED, lan=True)


def test_what_waits_for_a_restart_waits_also_when_another_agent_comes(instance: InstancePaths) -> None:
    config.save(instance, ASKED)
    config.load_running(instance, HOST)
    new = MountSpec("/srv/new", "/new")
    edited = replace(
        ASKED, cpus=1, disk=90 * GIB, network=NetworkSettings(proxies="none"), lan=True, mounts=(new,)
    )
    config.save(instance, edited)
    found = ProcessIdentity.of(os.getpid())
    assert found is not None
    found.write(instance.qemu_identity)
    same = replace(ASKED, lan=True, mounts=(HOME, new))
    assert config.load_running(instance, HOST) == (same, "")
    assert config.load_kept(instance.running_config) == same
    # As after a power cut: there is no VM that could be as it was.
    instance.qemu_identity.unlink()
    assert config.load_running(instance, HOST) == (edited, "")


def test_what_runs_is_kept_where_there_is_room(instance: InstancePaths) -> None:
    config.save(instance, ASKED)
    instance.running_config.mkdir()
    assert config.load_running(instance, HOST) == (ASKED, "")


def test_settings_of_dockerd_are_for_docker(instance: InstancePaths) -> None:
    instance.config.write_text("runtime: podman\n")
    assert config.load(instance, Host.measure()).runtime == "podman"
    instance.config.write_text("runtime: podman\ndocker:\n  debug: true\n")
    with pytest.raises(UserError, match="line 2.*the runtime is podman"):
        config.load(instance, Host.measure())
    instance.config.write_text("runtime: containerd\ndocker_sock: true\n")
    with pytest.raises(UserError, match="line 2.*containerd does not have"):
        config.load(instance, Host.measure())
    instance.config.write_text("runtime: podmn\n")
    with pytest.raises(UserError, match="did you mean podman"):
        config.load(instance, Host.measure())
