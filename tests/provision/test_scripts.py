"""quickstart, bench and uninstall against stand-ins for apt, sudo, docker and the VM, in paths that have spaces.

The scripts run from a copy of the checkout with a home of its own. Whatever they would do to the machine is
done by a stand-in, which writes down what it was asked for.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = ("quickstart", "test", "bench", "uninstall", "lib.sh")
IMAGE = "0123456789abcdef"

# $state holds what a stand-in knows; its files are written by the tests.
STAND_INS = {
    "apt-get": """
case " $* " in
*" -s "*" install "*) cat "$state/plan" ;;
*" -s "*" purge "*)
    for name do
        case $name in -* | purge | *::*) continue ;; esac
        echo "Purg $name [1.0]"
        [ ! -e "$state/along-$name" ] || sed 's/.*/Remv & [1.0]/' "$state/along-$name"
    done ;;
*" update "*) [ ! -e "$state/fail-update" ] ;;
*" install "*) [ ! -e "$state/fail-install" ] ;;
esac
""",
    "apt-cache": 'cat "$state/depends"\n',
    "apt-mark": 'cat "$state/manual"\n',
    "dpkg": "echo amd64\n",
    "dpkg-query": """
for name do :; done
grep -qx "$name" "$state/installed" && printf 'install ok installed'
""",
    "sudo": 'exec "$@"\n',
    "id": """
case "$*" in
-u) cat "$state/uid" ;;
-un) echo someone ;;
*) [ -e "$state/test-user" ] && echo 4242 ;;
esac
""",
    "getent": 'echo "agentctl-nobody:x:4242:4242::$state/test-user:/bin/bash"\n',
    "setpriv": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"\n',
    "userdel": "",
    "curl": '[ -e "$state/container" ] && echo hello\n',
    "docker": """
case $1 in
inspect) cat "$state/container" 2>/dev/null ;;
rm) rm "$state/container"; touch "$state/removed" ;;
import) cat >"$state/imported" ;;
run) while [ "$1" != -p ]; do shift; done; echo "${2%:80}" >"$state/container" ;;
esac
""",
}

AGENTCTL = """
case $1 in
up) [ ! -e "$state/fail-up" ] || { echo "error: no VM today" >&2; exit 7; } ;;
env) echo "export DOCKER_HOST=unix:///nowhere" ;;
exec) echo busybox ;;
status) echo '{"accelerator": "kvm"}' ;;
esac
"""

# The interpreter of the virtual environment: the real one, but for the program that it would run.
PYTHON = f"""
case "$*" in
"-P -c import host_agent.cli") ;;
"-m tests.bench."*) echo "$PWD" >"$state/benched-in" ;;
"-P -m "*) echo "AGENTCTL_HOME=$AGENTCTL_HOME HOME=$HOME $AGENTCTL_INSTANCE" >>"$state/deleted"; rm -rf "$AGENTCTL_HOME/instances/$AGENTCTL_INSTANCE" ;;
*) exec "{sys.executable}" "$@" ;;
esac
"""


@dataclass(frozen=True)
class Place:
    """A checkout, a user's home and the stand-ins' state."""

    base: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def checkout(self) -> Path:
        return self.base / "a checkout"

    @property
    def user(self) -> Path:
        return self.base / "a home"

    @property
    def home(self) -> Path:
        return Path(self.environment.get("AGENTCTL_HOME") or self.user / ".agentctl")

    @property
    def state(self) -> Path:
        return self.base / "state"

    def program(self, path: Path, script: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.name
        path.write_text(f'#!/bin/bash\nstate="{self.state}"\necho "{name} $*" >>"$state/calls"\n{script}')
        path.chmod(0o755)

    def make_venv(self) -> None:
        """A virtual environment that is up to date."""
        self.program(self.checkout / ".venv/bin/python", PYTHON)
        self.program(self.checkout / ".venv/bin/agentctl", AGENTCTL)
        Path(self.lib('venv_stamp "$checkout/.venv" ""').stdout).touch()

    def calls(self, beginning: str) -> list[str]:
        calls = (self.state / "calls").read_text().splitlines() if (self.state / "calls").exists() else []
        return [call for call in calls if call.startswith(beginning)]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "HOME": str(self.user),
            "PATH": f"{self.base / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            **self.environment,
        }
        return subprocess.run(
            command,
            env=environment,
            cwd=self.base,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.checkout / "provision" / name), *arguments)

    def lib(self, code: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", "-c", f'. "{self.checkout}/provision/lib.sh"\n{code}')

    def uninstall(self) -> str:
        done = self.script("uninstall", "--yes")
        assert done.returncode == 0, done
        return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    (place.checkout / "provision").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(REPOSITORY / "provision" / name, place.checkout / "provision" / name)
    # Whatever happens, the machine's own test user is not meant.
    lib = place.checkout / "provision" / "lib.sh"
    lib.write_text(
        lib.read_text()
        .replace("agentctl-test", "agentctl-nobody")
        .replace("/etc/ssh/sshd_not_to_be_run", f"'{tmp_path}/etc of it/ssh/sshd_not_to_be_run'")
    )
    (place.checkout / "pyproject.toml").write_text("[project]\n")
    place.user.mkdir()
    place.state.mkdir()
    for name, content in (("uid", "1000"), ("plan", ""), ("depends", ""), ("manual", ""), ("installed", "")):
        (place.state / name).write_text(content)
    for name, script in STAND_INS.items():
        place.program(tmp_path / "bin" / name, script)
    return place


def make_home(home: Path) -> None:
    """What agentctl leaves behind when it runs."""
    for name in (
        f"images/{IMAGE}/kernel",
        f"images/.build-{IMAGE}/root/x",
        "images/.lock",
        "cache/accelerators.json",
        "cache/agent-01234567.pyz",
        "tools/bin/docker",
        "tools/cli-plugins/docker-buildx",
        "tools/.lock",
        "instances/default/lock",
        "instances/default/data.img",
        "instances/dev-2/data.img",
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_understands_it(name: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / "provision" / name)], check=True)


@pytest.mark.parametrize("name", ["quickstart", "test", "bench", "uninstall"])
def test_help_says_what_it_does_and_does_nothing(place: Place, name: str) -> None:
    done = place.script(name, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 2
    assert "shellcheck" not in done.stdout
    assert place.calls("") == []


def test_output_that_is_no_terminal_is_plain(place: Place) -> None:
    assert place.lib("say hello").stdout == "==> hello\n"


# --- packages ----------------------------------------------------------------------------------------


def test_only_what_is_missing_is_installed_without_questions_and_written_down(place: Place) -> None:
    (place.state / "installed").write_text("curl\n")
    (place.state / "plan").write_text(
        "Inst libaio1 (0.3 Debian:12 [amd64])\n"
        "Inst libc6 [2.35] (2.36 Debian:12 [amd64])\n"
        "Inst qemu-utils (7.2 Debian:12 [amd64])\n"
        "Conf qemu-utils (7.2 Debian:12 [amd64])\n"
    )
    done = place.lib("need_packages curl qemu-utils")
    assert done.returncode == 0, done
    (install,) = place.calls("sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -y -qq -o "
                             "DPkg::Lock::Timeout=300 install")  # fmt: skip
    assert install.endswith("install --no-install-recommends qemu-utils")
    # libc6 was there before and is only upgraded.
    assert (place.home / "apt-installed").read_text() == "libaio1 auto\nqemu-utils\n"
    assert place.home.stat().st_mode & 0o777 == 0o700


def test_an_installation_that_fails_has_been_written_down(place: Place) -> None:
    (place.state / "plan").write_text("Inst qemu-utils (7.2 Debian:12 [amd64])\n")
    (place.state / "fail-install").touch()
    done = place.lib("need_packages qemu-utils")
    assert done.returncode == 1
    assert "error: apt-get could not install: qemu-utils" in done.stderr
    assert (place.home / "apt-installed").read_text() == "qemu-utils\n"


def test_somebody_elses_broken_package_source_is_not_in_the_way(place: Place) -> None:
    (place.state / "fail-update").touch()
    done = place.lib("need_packages qemu-utils")
    assert done.returncode == 0
    assert "going on" in done.stdout


def test_nothing_is_asked_of_root_when_nothing_is_missing(place: Place) -> None:
    (place.state / "installed").write_text("curl\n")
    assert place.lib("need_packages curl").stdout == ""
    assert place.calls("sudo") == []
    assert not place.home.exists()


def test_an_sshd_that_is_installed_does_not_run(place: Place) -> None:
    no_sshd = place.base / "etc of it/ssh/sshd_not_to_be_run"
    # The file is there before the package is.
    place.program(place.base / "bin/apt-get", f'[ -s "{no_sshd}" ] || exit 100\n')
    done = place.lib("need_sshd sshfs")
    assert done.returncode == 0, done
    (install,) = place.calls("sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -y -qq -o "
                             "DPkg::Lock::Timeout=300 install")  # fmt: skip
    assert install.endswith("install --no-install-recommends sshfs openssh-server")
    # Purging removes it; and if it never was installed, uninstall does.
    place.uninstall()
    assert not no_sshd.exists()


def test_somebodys_own_sshd_is_left_alone(place: Place) -> None:
    no_sshd = place.base / "etc of it/ssh/sshd_not_to_be_run"
    (place.state / "installed").write_text("openssh-server\n")
    assert place.lib("need_sshd").stdout == ""
    assert not no_sshd.exists()
    # Neither is what somebody has written there.
    (place.state / "installed").write_text("")
    no_sshd.parent.mkdir(parents=True)
    no_sshd.write_text("not here\n")
    assert place.lib("need_sshd").returncode == 0
    place.uninstall()
    assert no_sshd.read_text() == "not here\n"


def record(place: Place, *lines: str, installed: str) -> None:
    place.home.mkdir()
    (place.home / "apt-installed").write_text("".join(line + "\n" for line in lines))
    (place.state / "installed").write_text("\n".join(installed.split()) + "\n")


def purged(place: Place) -> list[str]:
    calls = [call for call in place.calls("apt-get") if " purge " in call and " -s " not in call]
    assert not any("autoremove" in call.lower().replace("automaticremove=false", "") for call in calls)
    return sorted(calls[0].split("AutomaticRemove=false ")[1].split()) if calls else []


def test_uninstall_purges_just_what_was_installed_and_says_it(place: Place) -> None:
    record(place, "qemu-utils", "libaio1 auto", "qemu-utils", "gone", installed="qemu-utils libaio1 curl")
    assert "for this: libaio1 qemu-utils" in place.uninstall()
    assert purged(place) == ["libaio1", "qemu-utils"]
    assert not place.home.exists()


def test_what_others_have_come_to_need_stays_with_all_it_needs_itself(place: Place) -> None:
    record(place, "qemu-utils", "libaio1 auto", "uidmap", installed="qemu-utils libaio1 uidmap libguestfs")
    (place.state / "along-qemu-utils").write_text("libguestfs\nlibaio1\n")
    (place.state / "depends").write_text(
        "libguestfs\n  Depends: qemu-utils\n  Depends: <virtual>\nqemu-utils\n  Depends: libaio1\n<virtual>\nlibaio1\n"
    )
    said = place.uninstall()
    assert "apt-get would remove libguestfs: libaio1 qemu-utils" in said
    assert purged(place) == ["uidmap"]


def test_a_dependency_that_the_user_asked_for_since_is_the_users(place: Place) -> None:
    record(place, "qemu-utils", "libaio1 auto", installed="qemu-utils libaio1")
    (place.state / "manual").write_text("libaio1\nqemu-utils\n")
    place.uninstall()
    assert purged(place) == ["qemu-utils"]


def test_apts_refusal_stops_before_anything_is_purged(place: Place) -> None:
    record(place, "qemu-utils", installed="qemu-utils")
    place.program(place.base / "bin/apt-get", "exit 100\n")
    done = place.script("uninstall", "--yes")
    assert done.returncode == 1
    assert purged(place) == []
    assert (place.home / "apt-installed").exists()


# --- what is ours ------------------------------------------------------------------------------------


def test_uninstall_in_a_home_that_is_the_users_own_takes_only_what_is_agentctls(place: Place) -> None:
    place.environment["AGENTCTL_HOME"] = str(place.user)
    make_home(place.user)
    record_of_life = ["letter.txt", "images/holiday.jpg", "tools/bin/hammer", "cache/coins", ".ssh/id"]
    for name in record_of_life:
        (place.user / name).parent.mkdir(exist_ok=True)
        (place.user / name).touch()
    said = place.uninstall()
    left = {str(path.relative_to(place.user)) for path in place.user.rglob("*") if path.is_file()}
    assert left == set(record_of_life)
    assert f"{place.user}/images stays" in said


def test_uninstall_leaves_nothing_of_a_home_of_its_own(place: Place) -> None:
    make_home(place.home)
    place.make_venv()
    (place.checkout / ".test/home").mkdir(parents=True)
    (place.checkout / "agentctl.egg-info").mkdir()
    links = (place.user / ".local/bin/agentctl", place.user / ".docker/cli-plugins/docker-buildx")
    targets = (place.checkout / ".venv/bin/agentctl", place.home / "tools/cli-plugins/docker-buildx")
    for link, target in zip(links, targets, strict=True):
        link.parent.mkdir(parents=True)
        link.symlink_to(target)
    (place.user / ".local/bin/docker").symlink_to("/opt/docker")
    place.uninstall()
    assert (place.state / "deleted").read_text().splitlines() == [
        f"AGENTCTL_HOME={place.home} HOME={place.user} {instance}" for instance in ("default", "dev-2")
    ]
    assert not place.home.exists()
    assert {path.name for path in place.checkout.iterdir()} == {"provision", "pyproject.toml"}
    assert not any(link.is_symlink() for link in links)
    assert (place.user / ".local/bin/docker").is_symlink()
    assert "removed" in place.uninstall(), "twice is fine"


def test_uninstall_does_not_ask_nobody(place: Place) -> None:
    make_home(place.home)
    done = place.script("uninstall")
    assert done.returncode == 1
    assert "--yes" in done.stderr
    assert (place.home / "instances/default/data.img").exists()


@pytest.fixture
def running(place: Place) -> Iterator[None]:
    make_home(place.home)
    with (place.home / "instances/default/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.usefixtures("running")
def test_without_the_program_that_stops_it_a_running_vm_is_not_taken_apart(place: Place) -> None:
    done = place.script("uninstall", "--yes")
    assert done.returncode == 1
    assert "error: a VM is running" in done.stderr
    assert "hint: make it again with ./provision/quickstart" in done.stderr
    assert (place.home / "instances/default/data.img").exists()
    assert (place.home / f"images/{IMAGE}/kernel").exists()


def test_without_the_program_the_remains_of_a_vm_that_is_dead_go(place: Place) -> None:
    make_home(place.home)
    place.uninstall()
    assert not place.home.exists()


def test_root_removes_the_test_user_after_its_vm(place: Place) -> None:
    (place.state / "uid").write_text("0")
    work = place.state / "test-user/agentctl-test"
    make_home(work / "home")
    place.program(work / "venv/bin/python", PYTHON)
    place.uninstall()
    assert (place.state / "deleted").read_text().splitlines() == [
        f"AGENTCTL_HOME={work / 'home'} HOME={place.state / 'test-user'} {instance}"
        for instance in ("default", "dev-2")
    ]
    (setpriv, *_) = place.calls("setpriv")
    assert "--reuid=agentctl-nobody --regid=4242 --init-groups" in setpriv
    assert place.calls("userdel") == ["userdel --remove agentctl-nobody"]


def test_an_ordinary_user_is_told_of_the_test_user_and_leaves_it(place: Place) -> None:
    (place.state / "test-user").touch()
    assert "sudo ./provision/uninstall" in place.uninstall()
    assert place.calls("userdel") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_what_belongs_to_somebody_else_is_left_to_them(place: Place) -> None:
    place.make_venv()
    for path in (place.checkout / ".venv").rglob("*"):
        os.chown(path, 4242, 4242)
    os.chown(place.checkout / ".venv", 4242, 4242)
    assert f"{place.checkout}/.venv stays" in place.uninstall()
    assert (place.checkout / ".venv/bin/agentctl").exists()


# --- copies ------------------------------------------------------------------------------------------


def make_tree(checkout: Path) -> None:
    for name in ("a b.py", ".test/home/secret", ".venv/x", "p/__pycache__/x.pyc", "p/-dash", ".mypy_cache/x"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()


def copied(place: Place, tree: Path) -> set[str]:
    done = place.lib(f'copy_sources "{tree}" "{place.base}/a copy"')
    assert done.returncode == 0, done
    return {
        str(path.relative_to(place.base / "a copy"))
        for path in (place.base / "a copy").rglob("*")
        if path.is_file()
    }


def test_a_tarballs_sources_are_copied_without_what_was_made_of_them(place: Place) -> None:
    make_tree(place.base / "a tree")
    assert copied(place, place.base / "a tree") == {"a b.py", "p/-dash"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkouts_files_are_copied_also_for_root_from_somebody_else(place: Place) -> None:
    tree = place.base / "a tree"
    make_tree(tree)
    shutil.copy(REPOSITORY / ".gitignore", tree / ".gitignore")
    (tree / "deleted.py").touch()
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    subprocess.run(["git", "-C", str(tree), "add", "."], check=True)
    (tree / "deleted.py").unlink()
    (tree / "new.py").touch()
    if os.geteuid() == 0:
        for path in (tree, *tree.rglob("*")):
            os.chown(path, 4242, 4242)
    assert copied(place, tree) == {".gitignore", "a b.py", "p/-dash", "new.py"}


# --- quickstart --------------------------------------------------------------------------------------


@pytest.fixture
def prepared(place: Place) -> Place:
    """With all packages there, and the virtual environment made."""
    packages = place.lib('printf "%s\\n" "${run_packages[@]}"').stdout
    (place.state / "installed").write_text(packages)
    place.make_venv()
    return place


def test_quickstart_ends_with_an_answer_and_its_link(prepared: Place) -> None:
    done = prepared.script("quickstart", "--cpus", "2")
    assert done.returncode == 0, done
    assert prepared.calls("agentctl up") == ["agentctl up --cpus 2"]
    assert " says: hello" in done.stdout
    assert (prepared.state / "imported").stat().st_size > 0
    link = prepared.user / ".local/bin/agentctl"
    assert link.readlink() == prepared.checkout / ".venv/bin/agentctl"
    assert f'export PATH="{prepared.user}/.local/bin:$PATH"' in done.stdout


def test_what_agentctl_says_is_what_quickstart_ends_with(prepared: Place) -> None:
    (prepared.state / "fail-up").touch()
    done = prepared.script("quickstart")
    assert done.returncode == 7
    assert done.stderr == "error: no VM today\n"
    assert prepared.calls("docker") == []


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_program_of_the_users_own_is_not_replaced(prepared: Place, kind: str) -> None:
    own = prepared.user / ".local/bin/agentctl"
    own.parent.mkdir(parents=True)
    own.write_text("mine") if kind == "file" else own.symlink_to("/opt/agentctl")
    done = prepared.script("quickstart")
    assert done.returncode == 0, done
    assert f"{own} is not ours and stays" in done.stdout
    assert not own.is_file() or own.read_text() == "mine"
    assert own.is_symlink() == (kind == "link")


def test_the_second_demonstration_has_the_port_of_the_first(prepared: Place) -> None:
    """The port of a container that was just removed is open for a moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (prepared.state / "container").write_text(f"{port}\n")

        def close_a_little_after_the_container() -> None:
            deadline = time.monotonic() + 30
            while not (prepared.state / "removed").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)
            listener.close()

        closing = threading.Thread(target=close_a_little_after_the_container)
        closing.start()
        done = prepared.script("quickstart")
        closing.join()
    assert done.returncode == 0, done
    assert f"curl localhost:{port} says: hello" in done.stdout


def test_a_virtual_environment_is_made_again_when_its_python_has_gone(prepared: Place) -> None:
    python = prepared.checkout / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nonexistent/python3.11")
    done = prepared.lib('say() { echo "$*"; exit 9; }\nmake_venv "$checkout/.venv"')
    assert done.returncode == 9
    assert done.stdout == f"making the virtual environment {prepared.checkout}/.venv\n"
    assert not python.is_symlink()


# --- bench -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "program", "packages"),
    [
        ((), "tests.bench.files", "openssh-client git openssh-sftp-server qemu-system-common sshfs"),
        (("files", "--rounds", "2"), "tests.bench.files --rounds 2", ""),
        (("--only", "ports"), "tests.bench.files --only ports", ""),
        (("ports", "--rounds", "2"), "tests.bench.ports --rounds 2", "openssh-client gcc libc6-dev"),
        (
            ("ports", "--without-vm"),
            "tests.bench.ports --without-vm",
            "openssh-client gcc libc6-dev openssh-server",
        ),
        (
            ("ports", "--rounds", "2", "--without-vm"),
            "tests.bench.ports --rounds 2 --without-vm",
            "openssh-client gcc libc6-dev openssh-server",
        ),
        (("files", "--without-vm"), "tests.bench.files --without-vm", ""),
        (("view", "--rounds", "2"), "tests.bench.view --rounds 2", "openssh-client sshfs"),
        (
            ("attached", "--delays", "20"),
            "tests.bench.attached --delays 20",
            "openssh-client git openssh-sftp-server sshfs openssh-server",
        ),
    ],
)
def test_bench_installs_what_is_compared_and_runs_it(
    prepared: Place, arguments: tuple[str, ...], program: str, packages: str
) -> None:
    done = prepared.script("bench", *arguments)
    assert done.returncode == 0, done
    assert prepared.calls("python -m") == [f"python -m {program}"]
    assert (prepared.state / "benched-in").read_text() == f"{prepared.checkout}\n"
    (install,) = prepared.calls("apt-get -y -qq -o DPkg::Lock::Timeout=300 install")
    expected = packages or "openssh-client git openssh-sftp-server qemu-system-common sshfs"
    assert install.endswith(f"--no-install-recommends {expected}")


def test_benchs_words_for_its_programs_are_theirs() -> None:
    for name in ("attached", "files", "ports", "view"):
        assert (REPOSITORY / "tests/bench" / name / "__main__.py").is_file()
