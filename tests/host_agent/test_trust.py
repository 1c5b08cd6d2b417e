from __future__ import annotations

import os
from pathlib import Path

import pytest

from host_agent import trust
from host_agent.proxies import MAX_LENGTH, VARIABLES
from host_agent.trust import collect
from protocol.frames import MAX_HEADER
from tests import certificates
from tests.certificates import Certificate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Certificate]:
    folder = tmp_path_factory.mktemp("certificates")
    return [certificates.make(folder, f"ca{number}.test") for number in range(3)]


def test_what_the_host_trusts(made: list[Certificate], tmp_path: Path) -> None:
    place = tmp_path / "anchors"
    (place / "corp").mkdir(parents=True)
    (place / "corp/a.crt").write_bytes(made[0].path.read_bytes())
    (place / "b.der").write_bytes(made[1].der)
    (place / "README").write_text("not a certificate, and not named like one")
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("# comments\n" + made[0].path.read_text() + "\n" + made[2].path.read_text())
    places = (str(place), str(tmp_path / "none"))
    trusted = collect(["host"], {"SSL_CERT_FILE": str(bundle)}, places)
    assert trusted.problems == ()
    assert sorted(trusted.certificates) == sorted(each.der for each in made)
    assert collect(["host"], {}, places).certificates == (made[1].der, made[0].der)
    assert collect([], {"SSL_CERT_FILE": str(bundle)}, places).certificates == ()


def test_files_and_folders_of_the_configuration(
    made: list[Certificate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(made[0].path.parent))
    trusted = collect([f"~/{made[0].path.name}", str(made[1].path), str(made[0].path)], {}, ())
    assert trusted.certificates == (made[0].der, made[1].der)
    assert set(collect([str(made[0].path.parent)], {}, ()).certificates) == {each.der for each in made}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "something else than certificates"),
        (b"hello", "something else than certificates"),
        (
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "something else than certificates",
        ),
        (b"-----BEGIN CERTIFICATE-----\nAAAAA\n-----END CERTIFICATE-----\n", "damaged"),
    ],
)
def test_a_file_that_holds_none_is_said_and_the_others_count(
    made: list[Certificate], tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    trusted = collect([str(path), str(made[0].path)], {}, ())
    assert trusted.certificates == (made[0].der,)
    (problem,) = trusted.problems
    assert problem.startswith(f"the VM does not trust {path}: ")
    assert reason in problem


def test_a_file_too_large_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    with path.open("wb") as file:
        os.truncate(file.fileno(), trust.MAX_FILE + 1)
    assert "too large" in collect([str(path)], {}, ()).problems[0]


def test_what_does_not_fit_into_a_message_is_said(
    made: list[Certificate], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(each.path) for each in made]
    monkeypatch.setattr(trust, "MAX_COUNT", 2)
    trusted = collect(paths, {}, ())
    assert trusted.certificates == (made[0].der, made[1].der)
    assert trusted.problems == ("the VM trusts the first 2 certificates of this machine; 1 more do not fit",)
    monkeypatch.setattr(trust, "MAX_TOTAL", len(made[0].der))
    assert collect(paths, {}, ()).certificates == (made[0].der,)


def test_what_fits_into_a_message_of_the_link() -> None:
    # Beside them there are the variables of proxies, each in both cases, the last with what needs none.
    variables = 2 * len(VARIABLES) * (MAX_LENGTH + 500)
    assert trust.MAX_TOTAL + 8 * trust.MAX_COUNT + variables < MAX_HEADER


def test_a_private_key_beside_its_certificate_stays_where_it_is(
    made: list[Certificate], tmp_path: Path
) -> None:
    path = tmp_path / "both.pem"
    path.write_bytes(made[0].key.read_bytes() + made[0].path.read_bytes())
    assert collect([str(path)], {}, ()).certificates == (made[0].der,)
