"""A copy goes on where it was: what both sides have read is not sent again, and nothing else is left out."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from protocol.errors import DecodeError
from protocol.treecopy import Cut, Entry, Kind, encode, piece_head
from protocol.treegauge import Gauge
from protocol.treeparts import PREFIX
from protocol.treereceive import CannotReceive, Receiver
from protocol.treeresume import (
    PART_FROM,
    Answer,
    decode_start,
    digest,
    encode_answer,
    encode_start,
    read_answer,
)
from protocol.treesend import Sender
from protocol.treesurvey import Survey

LARGE = 5 * PART_FROM + 12345


@dataclass
class Copied:
    """How a copy went: as the receiver saw it, and the sender."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    gauge: Gauge = field(default_factory=Gauge)
    sender: Gauge = field(default_factory=Gauge)
    error: BaseException | None = None


class Line(io.RawIOBase):
    """The receiver's end of the records, which are cut off after ``limit`` bytes."""

    def __init__(self, descriptor: int, limit: float) -> None:
        self._file = open(descriptor, "rb", 0)  # noqa: SIM115
        self._left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._file.read(min(len(view), int(min(self._left, 1 << 20))))
        self._left -= len(data)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def copied(
    *sources: Path | str, to: Path | str, limit: float = float("inf"), survey: Survey | None = None
) -> Copied:
    """As ``agentctl cp`` does it, over two pipes."""
    done = Copied()
    records, writing = os.pipe()
    answers, answering = os.pipe()

    def tell(path: str, reason: str) -> None:
        done.problems.append((path, reason))

    def send() -> None:
        with (
            contextlib.suppress(BrokenPipeError, Cut),
            open(answers, "rb") as heard,
            open(writing, "wb") as file,
        ):
            sender = Sender(file, tell, done.sender, answers=heard, survey=survey)
            for source in sources:
                sender.send(str(source))
            sender.finish()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with open(answering, "wb", 0) as said, io.BufferedReader(Line(records, limit)) as file:
            Receiver(file, str(to), tell, done.gauge, single=len(sources) == 1, answers=said).run()
    except (Cut, CannotReceive) as error:
        done.error = error
    finally:
        thread.join(60)
    assert not thread.is_alive()
    return done


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if os.fsencode(path.name).startswith(PREFIX))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(LARGE))
    os.utime(path, ns=(5, 7_000_000_011))
    path.chmod(0o640)
    return path


@pytest.fixture
def there(tmp_path: Path) -> Path:
    path = tmp_path / "there"
    path.mkdir()
    return path


def check(path: Path, source: Path) -> None:
    assert path.read_bytes() == source.read_bytes()
    assert path.stat().st_mtime_ns == source.stat().st_mtime_ns
    assert path.stat().st_mode == source.stat().st_mode


@pytest.mark.parametrize("limit", [PART_FROM // 2, 2 * PART_FROM, LARGE])
def test_only_the_rest_is_sent(source: Path, there: Path, limit: int) -> None:
    first = copied(source, to=there, limit=limit)
    assert isinstance(first.error, Cut)
    assert names(there) == [path.name for path in parts(there)]
    (part,) = parts(there)
    came = part.stat().st_size
    assert limit - (1 << 19) < came <= limit
    assert part.stat().st_mode & 0o777 == 0o600
    again = copied(source, to=there)
    assert (again.gauge.kept, again.gauge.size, again.gauge.read) == (came, LARGE - came, came)
    assert (again.sender.kept, again.sender.size) == (came, LARGE - came)
    assert (again.problems, names(there)) == ([], ["source"])
    check(there / "source", source)


def test_in_many_attempts(source: Path, there: Path) -> None:
    attempts = 0
    while copied(source, to=there / "name", limit=PART_FROM).error is not None:
        attempts += 1
        assert attempts < 20
    assert attempts >= 5
    assert names(there) == ["name"]
    check(there / "name", source)


def test_what_has_its_name_keeps_it_until_all_is_there(source: Path, there: Path) -> None:
    (there / "source").write_text("old")
    copied(source, to=there, limit=2 * PART_FROM)
    assert (there / "source").read_text() == "old"
    copied(source, to=there)
    check(there / "source", source)


def test_a_part_that_is_not_what_it_was_is_not_believed(source: Path, there: Path) -> None:
    """One byte of it is another; the whole is sent."""
    copied(source, to=there, limit=3 * PART_FROM)
    (part,) = parts(there)
    with part.open("r+b") as file:
        file.seek(PART_FROM)
        byte = file.read(1)
        file.seek(PART_FROM)
        file.write(bytes([byte[0] ^ 1]))
    again = copied(source, to=there)
    assert (again.gauge.kept, again.gauge.size) == (0, LARGE)
    assert names(there) == ["source"]
    check(there / "source", source)


@pytest.mark.parametrize("what", ["content", "time", "path", "size"])
def test_another_source_begins_anew_and_its_part_is_gone(source: Path, there: Path, what: str) -> None:
    copied(source, to=there / "name", limit=3 * PART_FROM)
    before = parts(there)
    match what:
        case "content":
            source.write_bytes(os.urandom(LARGE))
        case "time":
            os.utime(source, ns=(1, 1))
        case "path":
            source = source.rename(source.with_name("other"))
        case "size":
            with source.open("ab") as file:
                file.write(b"more")
    again = copied(source, to=there / "name", limit=2 * PART_FROM)
    assert again.gauge.kept == 0
    assert len(parts(there)) == 1
    assert parts(there) != before
    copied(source, to=there / "name")
    assert names(there) == ["name"]
    check(there / "name", source)


def test_a_source_that_lies_about_its_identity_is_found_out(source: Path, there: Path) -> None:
    """The same size and time, and another content, as tools that set all times make it."""
    copied(source, to=there, limit=3 * PART_FROM)
    status = source.stat()
    source.write_bytes(os.urandom(LARGE))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = copied(source, to=there)
    assert (again.gauge.kept, again.gauge.size) == (0, LARGE)
    check(there / "source", source)
    status = source.stat()
    source.write_bytes(os.urandom(LARGE))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert copied(source, to=there).gauge.size == LARGE
    check(there / "source", source)


def test_what_is_there_is_not_sent_again(tmp_path: Path, there: Path) -> None:
    """Of a folder of many files, after half of them came; its name was not there when it began."""
    root = tmp_path / "folder"
    (root / "deep").mkdir(parents=True)
    for number in range(300):
        (root / f"file{number}").write_bytes(os.urandom(20_000))
        (root / "deep" / f"small{number}").write_bytes(b"%d" % number)
    first = copied(root, to=there / "new", limit=3_000_000)
    assert isinstance(first.error, Cut)
    again = copied(root, to=there / "new")
    assert again.problems == []
    assert again.gauge.kept >= 2_000_000
    assert again.gauge.done == 300 * 20_000 + sum(len(str(number)) for number in range(300))
    assert names(there) == ["new"]
    assert names(there / "new") == names(root)
    for path in (path for path in root.rglob("*") if path.is_file()):
        check(there / "new" / path.relative_to(root), path)
    assert (there / "new").stat().st_mode == root.stat().st_mode
    assert (there / "new").stat().st_mtime_ns == root.stat().st_mtime_ns
    # It is complete now, and what is copied to a folder that is there goes into it.
    copied(root, to=there / "new")
    assert names(there / "new" / "folder") == names(root)


def test_another_folder_of_the_same_name_is_not_mixed_in(tmp_path: Path, there: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "src").mkdir(parents=True)
        (tmp_path / name / "src" / name).write_bytes(os.urandom(LARGE))
    copied(tmp_path / "one" / "src", to=there / "new", limit=2 * PART_FROM)
    copied(tmp_path / "other" / "src", to=there / "new")
    assert (there / "new" / "src" / "other").exists()
    copied(tmp_path / "one" / "src", to=there / "new")
    assert names(there / "new") == ["one", "src"]
    assert names(there / "new" / "src") == ["other"]


def test_both_sides_are_told_how_much_it_is(
    source: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.treesurvey.WAIT", 60)
    small = tmp_path / "small"
    small.write_bytes(b"small")
    with Survey([str(source), str(small)]) as survey:
        done = copied(source, small, to=there, survey=survey)
    assert (done.gauge.total, done.sender.total) == (LARGE + 5, LARGE + 5)
    assert (done.gauge.done, done.sender.done) == (LARGE + 5, LARGE + 5)
    assert (done.gauge.files, done.sender.files) == (2, 2)


def test_a_mode_that_changed_alone_is_set(source: Path, there: Path) -> None:
    copied(source, to=there)
    before = (there / "source").stat().st_ino
    source.chmod(0o755)
    assert copied(source, to=there).gauge.size == 0
    check(there / "source", source)
    assert (there / "source").stat().st_ino == before


def test_holes_are_neither_sent_nor_read(tmp_path: Path, there: Path) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        for at in (0, 3 << 30, 5 << 30):
            file.seek(at)
            file.write(os.urandom(PART_FROM))
        file.truncate(6 << 30)
    if source.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this filesystem has no holes")
    first = copied(source, to=there, limit=PART_FROM + PART_FROM // 2)
    assert isinstance(first.error, Cut)
    again = copied(source, to=there)
    assert again.gauge.size < 2 * PART_FROM
    assert again.gauge.done == 6 << 30
    with source.open("rb") as one, (there / "sparse").open("rb") as other:
        assert digest(one.fileno(), 6 << 30, Gauge()) == digest(other.fileno(), 6 << 30, Gauge())
    assert (there / "sparse").stat().st_size == 6 << 30
    assert (there / "sparse").stat().st_blocks * 512 < 1 << 30
    assert copied(source, to=there).gauge.size == 0


def test_parts_are_no_content(source: Path, there: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    copied(source, to=tmp_path / "folder", limit=2 * PART_FROM)
    assert parts(tmp_path / "folder")
    copied(tmp_path / "folder", to=there)
    assert names(there / "folder") == []


def test_a_full_disk_keeps_no_part(source: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(source, to=there, limit=2 * PART_FROM)
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("protocol.treereceive.os.write", write)
    done = copied(source, to=there)
    monkeypatch.setattr("protocol.treereceive.os.write", real)
    assert isinstance(done.error, CannotReceive)
    assert names(there) == []


def test_a_part_that_can_never_have_its_name_goes(source: Path, there: Path) -> None:
    (there / "source").mkdir()
    done = copied(source, to=there)
    assert [path for path, _ in done.problems] == [f"{there}/source"]
    assert names(there) == ["source"]


@pytest.mark.parametrize("plant", ["link", "pipe", "folder", "other name"])
def test_what_somebody_put_in_the_place_of_a_part_is_left_alone(
    source: Path, there: Path, tmp_path: Path, plant: str
) -> None:
    copied(source, to=there, limit=2 * PART_FROM)
    (part,) = parts(there)
    victim = tmp_path / "victim"
    victim.write_bytes(source.read_bytes()[: 2 * PART_FROM])
    part.unlink()
    match plant:
        case "link":
            part.symlink_to(victim)
        case "pipe":
            os.mkfifo(part)
        case "folder":
            part.mkdir()
        case "other name":
            os.link(victim, part)
    done = copied(source, to=there)
    assert (done.problems, done.error, done.gauge.kept) == ([], None, 0)
    check(there / "source", source)
    assert victim.stat().st_size == 2 * PART_FROM


# --- who lies --------------------------------------------------------------------------------------------


def told(there: Path, *records: bytes) -> tuple[bytes, BaseException | None]:
    """What a receiver answers to these."""
    said = io.BytesIO()
    error = None
    try:
        Receiver(io.BytesIO(b"".join(records)), str(there), lambda *_: None, single=False, answers=said).run()
    except (Cut, DecodeError) as raised:
        error = raised
    return said.getvalue(), error


def ask(path: bytes, size: int, mtime: int = 0, question: int = 1) -> bytes:
    return encode(Entry(Kind.ASK, b"id", question, mtime, size, path))


def test_a_receiver_tells_nothing_of_files_outside(tmp_path: Path, there: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(PART_FROM))
    (there / "way out").symlink_to(tmp_path)
    mtime = secret.stat().st_mtime_ns
    assert told(there, ask(b"way out/secret", PART_FROM, mtime))[0] == encode_answer(Answer(1, 0))
    for path in (b"../secret", b"a/../../secret", b"/etc/passwd", b"a//b", b"", b"a/./b"):
        answers, error = told(there, ask(path, PART_FROM, mtime))
        assert answers == b""
        assert isinstance(error, DecodeError)


def test_a_receiver_never_says_what_is_in_a_file(there: Path) -> None:
    (there / "own").write_bytes(os.urandom(PART_FROM))
    status = (there / "own").stat()
    guess = encode(Entry(Kind.PROVE, b"0" * 64, 1))
    answers, _ = told(there, ask(b"own", status.st_size, status.st_mtime_ns), guess)
    assert answers == encode_answer(Answer(1, status.st_size)) + encode_answer(Answer(1, 0))


@pytest.mark.parametrize(
    "records",
    [
        [encode(Entry(Kind.PROVE, b"0", 1))],
        [ask(b"a", PART_FROM), ask(b"a", PART_FROM)],
        [encode(Entry(Kind.FILE, b"a", 0o600, target=encode_start(1, 0)))],
        [ask(b"a", PART_FROM), encode(Entry(Kind.FILE, b"a", 0o600, target=encode_start(1, 5)))],
        [ask(b"a", PART_FROM), encode(Entry(Kind.FILE, b"a", 0o600, target=b"nonsense"))],
        [ask(b"a%d" % number, PART_FROM, question=number) for number in range(300)],
    ],
)
def test_a_sender_that_makes_no_sense_is_ended(there: Path, records: list[bytes]) -> None:
    assert isinstance(told(there, *records)[1], DecodeError)
    assert names(there) == []


def test_nobody_answers_who_cannot(there: Path) -> None:
    with pytest.raises(DecodeError):
        Receiver(io.BytesIO(ask(b"a", PART_FROM)), str(there), lambda *_: None, single=False).run()


def heard(source: Path, answers: Callable[[], bytes]) -> None:
    Sender(io.BytesIO(), lambda *_: None, answers=io.BytesIO(answers())).send(str(source))


@pytest.mark.parametrize(
    "answers",
    [
        [Answer(9, 0)],
        [Answer(1, LARGE + 1)],
        [Answer(1, 100), Answer(1, 50)],
    ],
)
def test_a_receiver_that_makes_no_sense_is_ended(source: Path, answers: list[Answer]) -> None:
    with pytest.raises(DecodeError):
        heard(source, lambda: b"".join(map(encode_answer, answers)))


def test_a_receiver_that_has_gone_answers_no_more(source: Path) -> None:
    with pytest.raises(Cut):
        heard(source, lambda: encode_answer(Answer(1, 0))[:5])
    with pytest.raises(Cut):
        read_answer(io.BytesIO())


def test_where_a_file_begins() -> None:
    assert decode_start(encode_start(2**32 - 1, 2**63)) == (2**32 - 1, 2**63)
    for nonsense in (b"", b"1", b"1 -1", b"1 1 1", b"1 " + b"9" * 30):
        with pytest.raises(DecodeError):
            decode_start(nonsense)


def test_a_digest_is_of_so_many_bytes_and_says_nothing_of_holes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(1 << 20) + b"x" + bytes(1 << 20))
    with other.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
        file.truncate((2 << 20) + 1)

    def of(path: Path, size: int) -> bytes:
        with path.open("rb") as file:
            return digest(file.fileno(), size, Gauge())

    size = one.stat().st_size
    assert of(one, size) == of(other, size)
    assert len({of(one, length) for length in (0, 1, 1 << 20, (1 << 20) + 1, size - 1, size)}) == 6
    with pytest.raises(OSError, match="shorter"):
        of(one, size + 1)


def test_pieces_of_a_file_with_no_place_are_passed_over(there: Path) -> None:
    """What was asked for such a file is forgotten: as many as come."""
    records = [encode(Entry(Kind.SYMLINK, b"folder", target=b"/"))]
    records.append(encode(Entry(Kind.ENTER, b"folder", 0o700)))
    for number in range(1, 600):
        records.append(ask(b"folder/f", PART_FROM, question=number))
        records.append(
            encode(Entry(Kind.FILE, b"f", 0o600, target=encode_start(number, 0))) + piece_head(1) + b"x"
        )
        records.append(bytes(4))
    records += [encode(Entry(Kind.LEAVE)), encode(Entry(Kind.END))]
    assert told(there, *records)[1] is None
    assert names(there) == ["folder"]
