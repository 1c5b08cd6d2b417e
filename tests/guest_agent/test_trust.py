"""The store of trusted certificates, below a root of the test's, as the tools of this machine read it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from guest_agent import trust
from guest_agent.trust import BUNDLE, HASHED, LOCAL
from tests import certificates
from tests.certificates import Certificate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Certificate]:
    """Two of different subjects, and one more of the first's."""
    folders = [tmp_path_factory.mktemp("certificates") for _ in range(2)]
    first, second = (certificates.make(folders[0], name) for name in ("one.test", "two.test"))
    return [first, second, certificates.make(folders[1], "one.test")]


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificates.make(tmp_path_factory.mktemp("distribution"), "old.test")


@pytest.fixture
def root(tmp_path: Path, distributed: Certificate) -> Path:
    (tmp_path / HASHED).mkdir(parents=True)
    shutil.copy(distributed.path, tmp_path / BUNDLE)
    return tmp_path


def bundled(root: Path) -> set[bytes]:
    """What OpenSSL reads from the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=root / BUNDLE)
    return set(context.get_ca_certs(binary_form=True))


def hashed(root: Path) -> dict[str, str]:
    return {path.name: str(path.readlink()) for path in (root / HASHED).iterdir() if path.is_symlink()}


def is_trusted_by_its_hash(root: Path, certificate: Certificate, folder: Path) -> bool:
    """Whether OpenSSL finds it in a folder with these links, which lead to where they lead in the guest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, target in hashed(root).items():
        (folder / name).symlink_to(f"{root}{target}")
    command = [
        "openssl",
        "verify",
        "-no-CAfile",
        "-no-CAstore",
        "-CApath",
        str(folder),
        str(certificate.path),
    ]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_they_are_trusted_by_whoever_reads_the_file_or_the_folder(
    root: Path, made: list[Certificate], distributed: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("path") / "x"
    trust.trust(root, [each.der for each in made])
    assert bundled(root) == {each.der for each in [*made, distributed]}
    assert all(is_trusted_by_its_hash(root, each, folder) for each in made)
    assert not is_trusted_by_its_hash(root, distributed, folder)
    assert {path.name for path in (root / LOCAL).iterdir()} == {
        f"agentctl-{number}.crt" for number in range(3)
    }
    assert {
        (root / BUNDLE).stat().st_mode & 0o777,
        (root / LOCAL / "agentctl-0.crt").stat().st_mode & 0o777,
    } == {0o644}


def test_what_the_host_no_longer_trusts_goes(
    root: Path, made: list[Certificate], distributed: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("path") / "x"
    before = (root / BUNDLE).read_text()
    trust.trust(root, [each.der for each in made])
    trust.trust(root, [made[1].der])
    assert bundled(root) == {made[1].der, distributed.der}
    assert [is_trusted_by_its_hash(root, each, folder) for each in made] == [False, True, False]
    trust.trust(root, [])
    assert (root / BUNDLE).read_text() == before
    assert hashed(root) == {}
    assert list((root / LOCAL).iterdir()) == []


def test_links_of_others_stay_and_ours_come_behind_them(root: Path, made: list[Certificate]) -> None:
    trust.trust(root, [made[0].der])
    (ours,) = hashed(root)
    trust.trust(root, [])
    (root / HASHED / ours).symlink_to("theirs.pem")
    trust.trust(root, [made[0].der, made[2].der])
    links = hashed(root)
    digest = ours.removesuffix(".0")
    assert set(links) == {ours, f"{digest}.1", f"{digest}.2"}
    assert links.pop(ours) == "theirs.pem"
    assert set(links.values()) == {f"/{LOCAL}/agentctl-0.crt", f"/{LOCAL}/agentctl-1.crt"}
    trust.trust(root, [])
    assert hashed(root) == {ours: "theirs.pem"}


def test_what_the_distribution_has_is_not_added(root: Path, distributed: Certificate) -> None:
    before = (root / BUNDLE).read_text()
    trust.trust(root, [distributed.der])
    assert (root / BUNDLE).read_text() == before
    assert not (root / LOCAL).exists()


def test_twice_starts_no_process(root: Path, made: list[Certificate]) -> None:
    trust.trust(root, [made[0].der, made[0].der])
    written = (root / BUNDLE).stat().st_ino

    def rehash(folder: Path) -> None:
        pytest.fail("nothing has changed")

    trust.trust(root, [made[0].der], rehash)
    assert (root / BUNDLE).stat().st_ino == written


def test_a_guest_without_a_store_gets_one(tmp_path: Path, made: list[Certificate]) -> None:
    trust.trust(tmp_path, [made[0].der])
    assert bundled(tmp_path) == {made[0].der}


def test_links_that_could_not_be_made_are_tried_again(root: Path, made: list[Certificate]) -> None:
    def rehash(folder: Path) -> None:
        raise subprocess.TimeoutExpired("openssl", 20)

    with pytest.raises(subprocess.SubprocessError):
        trust.trust(root, [made[0].der], rehash)
    assert made[0].der in bundled(root)
    assert hashed(root) == {}
    trust.trust(root, [made[0].der])
    assert len(hashed(root)) == 1


@pytest.mark.parametrize("count", [trust.MAX_COUNT + 1])
def test_too_many_are_refused(root: Path, count: int) -> None:
    certificates: Sequence[bytes] = [str(number).encode() for number in range(count)]
    with pytest.raises(ValueError, match="512 are possible"):
        trust.trust(root, certificates)
