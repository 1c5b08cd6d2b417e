"""Everyday programs on the mount; what they leave behind is looked at on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.harness import Plane

GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.invalid",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.invalid",
    # The mount belongs to root, and so does this test; a share of another user's would be refused.
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
}


@pytest.fixture(autouse=True)
def clean(plane: Plane) -> Iterator[None]:
    yield
    for path in plane.host.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    plane.heard()


def host_sh(plane: Plane, script: str) -> str:
    argv = ["sh", "-ec", script]
    done = subprocess.run(argv, cwd=plane.host, capture_output=True, timeout=60, env={**os.environ, **GIT})
    assert done.returncode == 0, done.stderr
    plane.heard()
    return done.stdout.decode(errors="backslashreplace")


def test_git_from_init_to_gc(plane: Plane) -> None:
    said = plane.sh(
        """
        git init -q -b main repo
        cd repo
        for i in $(seq 14); do mkdir -p d$((i % 7)); echo "file $i" >d$((i % 7))/f$i; done
        ln -s d1/f1 link
        printf '#!/bin/sh\\necho run\\n' >tool; chmod 755 tool
        git add -A; git commit -q -m first
        for i in $(seq 2); do echo "line $i" >>d1/f1; git commit -q -am "change $i"; done
        git checkout -q -b side HEAD~1; echo side >side; git add side; git commit -q -m side
        git checkout -q main; git merge -q -m merge side
        git gc -q --prune=now; git fsck --strict --full
        git stash list; git status --porcelain; git log --oneline | wc -l
        git clone -q . ../clone; git clone -q --no-hardlinks . ../copy
        cd ../clone; git mv d2 moved; git commit -q -m moved; git push -q origin HEAD:refs/heads/pushed
        ./tool
        """,
        env=GIT,
    )
    assert said.split() == ["5", "run"]
    assert host_sh(
        plane, "cd repo; git fsck --full; git status --porcelain; git log --oneline pushed | wc -l"
    ).split() == ["6"]
    assert (plane.host / "repo/link").readlink() == Path("d1/f1")
    assert plane.sh("cd repo; git status --porcelain; test -z \"$(find .git -name '*.lock')\"", env=GIT) == ""


def test_git_sees_what_the_host_commits(plane: Plane) -> None:
    plane.sh("git init -q -b main repo; cd repo; echo one >file; git add file; git commit -q -m one", env=GIT)
    host_sh(plane, "cd repo; echo two >file; git commit -q -am two; echo three >file")
    said = plane.sh(
        "cd repo; git log --format=%s; git diff --stat | tail -1; cat file; git commit -qam three", env=GIT
    )
    assert said.split() == [
        "two",
        "one",
        *["1", "file", "changed,", "1", "insertion(+),", "1", "deletion(-)"],
        "three",
    ]
    assert host_sh(plane, "cd repo; git log --format=%s; git status --porcelain").split() == [
        "three",
        "two",
        "one",
    ]


SQLITE = """
import sqlite3, sys
mode, who = sys.argv[1:]
db = sqlite3.connect("data.db", timeout=60, isolation_level=None)
assert db.execute(f"pragma journal_mode={mode}").fetchone()[0] == mode
db.execute("create table if not exists entries (who text, number integer)")
for number in range(20):
    db.execute("begin immediate")
    db.executemany("insert into entries values (?, ?)", [(who, number * 10 + i) for i in range(10)])
    db.execute("rollback" if number % 10 == 9 else "commit")
print(db.execute("select count(*) from entries where who = ?", (who,)).fetchone()[0])
db.close()
"""


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "wal"])
def test_sqlite_of_two_processes(plane: Plane, mode: str) -> None:
    argv = [sys.executable, "-c", SQLITE, mode]
    # Both turn the journal to this mode: the first does it alone.
    assert plane.run([*argv, "first"]).output == "180\n"
    with plane.start([*argv, "a"]) as one, plane.start([*argv, "b"]) as two:
        for process in (one, two):
            finished = process.wait(90)
            assert (finished.status, finished.output) == (0, "180\n"), finished.errors
    check = "sqlite3 data.db 'pragma integrity_check; select who, count(*), sum(number) from entries group by who'"
    expected = "ok\n" + "".join(
        f"{who}|180|{sum(n for n in range(200) if n // 10 % 10 != 9)}\n" for who in ("a", "b", "first")
    )
    assert plane.sh(check) == expected
    assert host_sh(plane, check) == expected


def test_a_database_of_the_hosts_is_read_anew(plane: Plane) -> None:
    host_sh(plane, "sqlite3 data.db 'create table t (x); insert into t values (1)'")
    assert plane.sh("sqlite3 data.db 'select sum(x) from t'") == "1\n"
    host_sh(plane, "sqlite3 data.db 'insert into t values (41)'")
    assert plane.sh("sqlite3 data.db 'select sum(x) from t; insert into t values (100)'") == "42\n"
    assert host_sh(plane, "sqlite3 data.db 'select sum(x) from t; pragma integrity_check'") == "142\nok\n"


TREE = """
mkdir -p tree/a/b "tree/with space" tree/empty
for i in $(seq 16); do head -c $((i * 2503)) /dev/urandom >tree/a/b/f$i; done
ln -s ../a/b/f1 "tree/with space/link"; ln tree/a/b/f2 tree/hard; ln -s nowhere tree/dangling
mkfifo tree/fifo; chmod 640 tree/a/b/f3; chmod 1770 tree/empty; touch -d @1234567890.123456789 tree/a/b/f4
truncate -s 3M tree/sparse; printf x | dd of=tree/sparse bs=1 seek=2000000 conv=notrunc status=none
touch "tree/$(printf 'n\\377me')"
"""
LOOK = r"export LC_ALL=C; cd '%s'; find . -printf '%%y %%P %%m %%s %%T@ %%n %%l\n' | grep -v '^d' | sort; find . -type f -print0 | sort -z | xargs -0 sha256sum"


@pytest.mark.parametrize(
    "copy",
    [
        "cp -a tree/. copy",
        "mkdir copy; tar -C tree --format=posix -cf - . | tar -C copy -xpf -",
        "tar -C tree --format=posix --sparse -cf all.tar .; mkdir copy; tar -C copy -xpf all.tar; rm all.tar",
    ],
    ids=["cp", "tar", "sparse tar"],
)
def test_trees_are_copied_whole(plane: Plane, copy: str) -> None:
    plane.sh(TREE)
    plane.sh(copy)
    original = plane.sh(LOOK % "tree")
    assert plane.sh(LOOK % "copy") == original
    assert host_sh(plane, LOOK % "copy") == original
    plane.sh("rm -r tree copy")
    assert list(plane.host.iterdir()) == []


def test_an_update_in_place_as_rsync_does_it(plane: Plane) -> None:
    (plane.host / "target").mkdir()
    for round_ in range(2):
        plane.sh(
            f"""
            mkdir -p source; for i in $(seq 12); do echo "round {round_} file $i" >source/f$i; done
            for f in source/*; do
                name=$(basename $f); cp -p $f target/.$name.Xy3; mv target/.$name.Xy3 target/$name
            done
            cp -pr --update source/. target; diff -r source target
            """
        )
        assert (plane.host / "target/f12").read_text() == f"round {round_} file 12\n"
    assert len(list((plane.host / "target").iterdir())) == 12


def wheel(directory: Path) -> Path:
    """A wheel of 12 modules and a script, made here: PEP 427."""
    path = directory / "sample-1.0-py3-none-any.whl"
    info = "sample-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        names = ["sample/__init__.py", *(f"sample/module{index}.py" for index in range(12))]
        for index, name in enumerate(names):
            archive.writestr(name, f"VALUE = {index}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/entry_points.txt", "[console_scripts]\nsample = sample.module7:VALUE.__str__\n"
        )
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
    return path


def test_pip_installs_and_python_imports(plane: Plane) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
    ]
    with_wheel = wheel(plane.directory)
    beside = {"PYTHONPYCACHEPREFIX": ""}  # where compiled modules go, whatever our caller wants
    environment = {"PIP_ROOT_USER_ACTION": "ignore", **beside}
    plane.run(
        [*pip, "--target", str(plane.guest / "site"), str(with_wheel)],
        env=environment,
        timeout=120,
    )
    for _ in range(2):  # compiled the first time, from the cache the second
        said = plane.python(
            "import sys; sys.path.insert(0, 'site'); from sample.module11 import VALUE; print(VALUE)",
            env=beside,
        )
        assert said == "12\n"
    assert len(list((plane.host / "site/sample/__pycache__").glob("*.pyc"))) in (12, 13)
    plane.run(
        [*pip, "--upgrade", "--target", str(plane.guest / "site"), str(with_wheel)],
        env=environment,
        timeout=120,
    )


def test_make_and_cc(plane: Plane) -> None:
    plane.sh(
        """
        for i in $(seq 12); do echo "int f$i(void) { return $i; }" >f$i.c; done
        { for i in $(seq 12); do echo "int f$i(void);"; done; echo '#include <stdio.h>'; echo '#include "v.h"'
          printf '%s\\n' 'int main(void) { printf("%d %d\\n", f1() + f12(), V); return 0; }'; } >main.c
        echo '#define V 1' >v.h
        printf 'OBJ = main.o $(patsubst %%,f%%.o,1 2 3 4 5 6 7 8 9 10 11 12)\\nprog: $(OBJ)\\n\\tcc -o $@ $^\\nmain.o: v.h\\n' >Makefile
        """
    )
    assert plane.sh("make -s -j4 && ./prog", timeout=120) == "13 1\n"
    assert plane.sh("make -q && echo nothing to do") == "nothing to do\n"
    (plane.host / "v.h").write_text("#define V 2\n")  # an edit on the host, a build in the guest
    plane.heard()
    assert plane.sh("make -s && ./prog") == "13 2\n"
    (plane.host / "v.h").write_text("#define V 3\n")  # of the same length, and at once
    plane.heard()
    assert plane.sh("make -s && ./prog") == "13 3\n"
    # Until the file server has closed what the linker wrote, the host's kernel says ETXTBSY.
    assert host_sh(plane, "sleep 1; ./prog") == "13 3\n"


SAVES = {
    "in place": "printf %s {new} >file",
    "renamed over": "printf %s {new} >file.tmp && sync -d file.tmp && mv file.tmp file",
    "backup, then new (vim)": "mv file file~; printf %s {new} >file; chmod --reference=file~ file; rm file~",
    "linked backup (emacs)": "ln file file.bak; printf %s {new} >.#new; mv .#new file; rm file.bak",
    "exchanged": "printf %s {new} >other; " + sys.executable
    + " -c 'import ctypes; ctypes.CDLL(None).renameat2(-100, b\"other\", -100, b\"file\", 2)'; rm other",
    "truncated and appended": ": >file; printf %s {new} >>file",
    "dd": "printf %s {new} | dd of=file conv=notrunc,fsync status=none",
}  # fmt: skip


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_editors_saves_in_turn(plane: Plane, save: str) -> None:
    """Guest and host save in turn; whoever looks next sees it, whichever way it was saved."""
    (plane.host / "file").write_text("content 0")
    plane.heard()
    assert plane.sh("cat file") == "content 0"
    for number in range(1, 7):
        script = save.format(new=f"'content {number}'")
        plane.sh(script) if number % 2 else host_sh(plane, script)
        assert plane.sh("cat file") == (plane.host / "file").read_text() == f"content {number}"
    assert [path.name for path in plane.host.iterdir()] == ["file"]


def test_a_reader_that_follows_the_hosts_log(plane: Plane) -> None:
    log = plane.host / "log"
    log.write_text("")
    with plane.start(["sh", "-c", "tail -n +1 -s 0.05 ---disable-inotify -f log | head -n 20"]) as follower:
        with log.open("a") as file:
            for number in range(20):
                file.write(f"line {number}\n")
                file.flush()
        finished = follower.wait(30)
    assert finished.output == "".join(f"line {number}\n" for number in range(20))


def test_grep_and_find_over_a_tree_that_the_host_changes(plane: Plane) -> None:
    for one in range(10):
        directory = plane.host / f"d{one}"
        directory.mkdir()
        for two in range(20):
            (directory / f"f{two}").write_text(f"needle {one} {two}\n" if two % 10 == 0 else "hay\n" * 100)
    assert plane.sh("grep -rl needle . | wc -l; find . -type f | wc -l").split() == ["20", "200"]
    shutil.rmtree(plane.host / "d3")
    (plane.host / "d4" / "f1").write_text("needle, too\n")
    (plane.host / "d5").rename(plane.host / "d0" / "moved")
    plane.heard()
    assert plane.sh("grep -rl needle . | wc -l; find . -type f | wc -l; find d0 | wc -l").split() == [
        "19",
        "180",
        "42",
    ]
