"""Files on a machine that is no VM, for a user who is not root there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.files.harness import Folder, eventually
from tests.files.ordinary import GUEST, HOST, UsersPlane, obstacle


@pytest.fixture(autouse=True, scope="module")
def possible() -> None:
    if reason := obstacle():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def shared() -> Iterator[UsersPlane]:
    with UsersPlane() as plane:
        yield plane


def test_what_is_the_hosts_users_is_the_machines_users(shared: UsersPlane) -> None:
    shared.host_sh("mkdir own && echo text >own/file && ln -s file own/link")
    said = shared.sh("stat -c '%u %g %F' . own own/file own/link")
    ours = f"{GUEST} {GUEST}"
    assert said == f"{ours} directory\n" * 2 + f"{ours} regular file\n{ours} symbolic link\n"
    assert shared.sh("ls -n own | awk 'NR > 1 {print $3, $4}'") == f"{ours}\n" * 2
    shared.sh("echo more >>own/file; mkdir own/made; echo new >own/made/file; chmod 600 own/made/file")
    assert shared.host_sh("cat own/file own/made/file") == "text\nmore\nnew\n"
    assert shared.host_sh("stat -c '%u %g %a' own/made/file") == f"{HOST} {HOST} 600\n"


def test_what_is_somebody_elses_is_nobodys(shared: UsersPlane) -> None:
    """Also what belongs to who has our number there on the host."""
    theirs = shared.host / "theirs"
    theirs.write_text("kept")
    theirs.chmod(0o600)
    os.chown(theirs, GUEST, GUEST)
    shared.heard()
    assert shared.sh("stat -c '%u %g' theirs") == "65534 65534\n"
    assert shared.run(["cat", "theirs"], status=1).errors.strip().endswith("Permission denied")


def test_files_are_given_to_their_user_and_to_nobody_else(shared: UsersPlane) -> None:
    shared.sh(f"echo x >given; chown {GUEST}:{GUEST} given; chgrp {GUEST} given")
    assert shared.host_sh("stat -c '%u %g' given") == f"{HOST} {HOST}\n"
    for to in (HOST, 0, 65534):
        assert "not permitted" in shared.run(["chown", str(to), "given"], status=1).errors
    assert shared.host_sh("stat -c '%u %g' given") == f"{HOST} {HOST}\n"


def test_modes_are_judged(shared: UsersPlane) -> None:
    shared.host_sh("echo x >fixed; chmod 444 fixed; mkdir shut; chmod 0 shut")
    assert "Permission denied" in shared.run(["sh", "-c", "echo y >fixed"], status=2).errors
    assert "Permission denied" in shared.run(["ls", "shut"], status=2).errors
    shared.host_sh("chmod 700 shut")


def test_git_takes_a_repository_for_its_users(shared: UsersPlane) -> None:
    environment = "export HOME=/nowhere GIT_CONFIG_NOSYSTEM=1; git config --file /dev/null --list;"
    identity = "-c user.name=n -c user.email=e@example.org"
    shared.host_sh(
        f"{environment} git init -q repository; cd repository; echo 1 >a; git add a; git {identity} commit -qm one"
    )
    assert (
        shared.sh(
            f"{environment} cd repository; git status --porcelain; echo 2 >b; git add b;"
            f"git {identity} commit -qm two; git fsck --no-progress; git log --format=%s"
        )
        == "two\none\n"
    )
    assert (
        shared.host_sh(f"{environment} cd repository; git status --porcelain; git log --format=%s")
        == "two\none\n"
    )


def test_changes_of_the_host_are_heard_of(shared: UsersPlane) -> None:
    shared.host_sh("mkdir seen; for n in 1 2 3 4 5; do echo $n >seen/$n; done")
    assert shared.sh("cat seen/*; ! test -e seen/6") == "1\n2\n3\n4\n5\n"
    shared.host_sh("echo other >seen/1; rm seen/2; echo 6 >seen/6; mv seen/3 seen/7")
    shared.heard()
    assert shared.sh("cd seen; ls; cat 1 6 7") == "1\n4\n5\n6\n7\nother\n6\n3\n"


def test_the_last_words_of_a_written_file_are_there(shared: UsersPlane) -> None:
    shared.sh("head -c 5000000 /dev/urandom >large; cp large copy; cmp large copy; truncate -s 1000001 copy")
    assert shared.host_sh("cmp -n 1000001 large copy; stat -c %s large copy") == "5000000\n1000001\n"


def test_shares_come_go_and_change_while_others_stay() -> None:
    stays, comes = Folder("stays", "stays"), Folder("comes", "comes")
    with UsersPlane(stays) as plane:
        (plane.host_root / "comes").mkdir()
        os.chown(plane.host_root / "comes", HOST, HOST)
        assert len(plane.namespace.mounts()) == 1
        with plane.start(["sleep", "600"]):  # in the share that stays
            plane.serve(stays, comes)
            plane.wait_mounted()
            plane.sh("echo x >new", cwd=plane.guest_path(comes))
            assert (plane.host_path(comes) / "new").read_text() == "x\n"
            # Writable or not takes another mount; the folder is the same.
            frozen = Folder("comes", "comes", read_only=True)
            plane.serve(stays, frozen)
            eventually(
                "it is read-only",
                lambda: any(
                    option == "ro"
                    for path, options in plane.namespace.mounts()
                    for option in options.split(",")
                    if path == str(plane.guest_path(comes))
                ),
            )
            plane.wait_mounted()
            assert "Read-only" in plane.run(["touch", "y"], cwd=plane.guest_path(comes), status=1).errors
            assert plane.sh("cat new", cwd=plane.guest_path(comes)) == "x\n"
            plane.serve(stays, comes)
            eventually(
                "it is writable",
                lambda: all("ro" not in options.split(",") for _, options in plane.namespace.mounts()),
            )
            plane.wait_mounted()
            plane.sh("echo z >>new", cwd=plane.guest_path(comes))
            plane.serve(stays)
            eventually("it is gone", lambda: len(plane.namespace.mounts()) == 1)
            assert plane.sh("pwd; ls -a") == f"{plane.guest_path(stays)}\n.\n..\n"


def test_a_share_where_the_user_may_not_is_a_sentence_and_no_others_trouble() -> None:
    good, bad = Folder("good", "good"), Folder("bad", "bad")
    with UsersPlane(good) as plane:
        (plane.host_root / "bad").mkdir()
        plane.guest_path(bad).mkdir()  # root's
        plane.serve(good, bad)
        plane.wait_mounted()
        assert plane.state(0).reason == ""
        assert "no write access to mountpoint" in plane.state(1).reason
        plane.guest_path(bad).rmdir()
        plane.serve(good, Folder("bad", "good/bad"))
        eventually("it is refused", lambda: "takes user_allow_other" in plane.state(1).reason)
        plane.sh("echo x >file", cwd=plane.guest_path(good))


def test_nothing_is_left_of_an_orderly_end_and_a_killed_one_is_replaced() -> None:
    with UsersPlane() as plane:
        plane.sh("echo x >file")
        plane.agent.kill()
        assert len(plane.namespace.mounts()) == 1
        plane.agent.start()
        plane.wait_mounted()
        eventually("it is served again", lambda: plane.run(["cat", "file"], status=None).output == "x\n")
        assert len(plane.namespace.mounts()) == 1
        plane.agent.end()
        assert plane.namespace.mounts() == []
        assert plane.server.alive()
