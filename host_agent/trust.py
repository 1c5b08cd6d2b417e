"""Certificates of authorities that this host trusts beyond its distribution's, for the guest to trust as well.

The law: a file that cannot be read, or that holds no certificate, is said and costs nobody else anything; and the whole
fits into one message. It is read anew for each session, so what the host no longer trusts the guest does not either.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from host_agent.network_settings import HOST_CERTIFICATES

logger = logging.getLogger(__name__)

#: Where administrators put them: Debian and Ubuntu; Fedora and its kin; openSUSE; Arch.
PLACES = (
    "/usr/local/share/ca-certificates",
    "/etc/pki/ca-trust/source/anchors",
    "/etc/pki/trust/anchors",
    "/etc/ca-certificates/trust-source/anchors",
)

#: OpenSSL's, which many programs know: a file with all that is to be trusted.
FILE_VARIABLE = "SSL_CERT_FILE"

#: Bytes of all of them together: Mozilla's list, which such a file may repeat, has 160 KiB; a message's header 256.
MAX_TOTAL = 200 * 1024
MAX_COUNT = 400

#: Bytes of a file that is looked at: Mozilla's list has 220 KiB.
MAX_FILE = 4 << 20

_PEM = re.compile(
    rb"-----BEGIN (?:X509 )?CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END (?:X509 )?CERTIFICATE-----"
)


@dataclass(frozen=True, slots=True)
class Trusted:
    """Certificates in DER, each once, and in sentences what is not among them."""

    certificates: tuple[bytes, ...]
    problems: tuple[str, ...] = ()


def collect(paths: Sequence[str], environment: Mapping[str, str], places: Sequence[str] = PLACES) -> Trusted:
    """The certificates in ``paths``, files or folders; for ``HOST_CERTIFICATES`` what the host trusts. Blocks."""
    found: dict[bytes, None] = {}
    problems: list[str] = []
    for path in paths:
        named = path != HOST_CERTIFICATES
        for file in _files([os.path.expanduser(path)] if named else _of_host(environment, places)):
            try:
                certificates = _read(file)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                problems.append(f"the VM does not trust {file}: {reason}")
                continue
            found.update(dict.fromkeys(certificates))
    taken, left = _within_limits(found)
    if left:
        problems.append(
            f"the VM trusts the first {len(taken)} certificates of this machine; {left} more do not fit"
        )
    return Trusted(taken, tuple(problems))


def _of_host(environment: Mapping[str, str], places: Iterable[str]) -> list[str]:
    variable = environment.get(FILE_VARIABLE, "")
    return [*(place for place in places if os.path.isdir(place)), *([variable] if variable else [])]


def _files(paths: Iterable[str]) -> Iterator[str]:
    """The paths themselves, and of folders all files in them that may be certificates."""
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                if name.endswith((".crt", ".pem", ".cer", ".der")):
                    yield os.path.join(folder, name)


def _read(path: str) -> list[bytes]:
    """The certificates in a file, PEM or DER. Raises ``OSError``; ``ValueError`` with a clause."""
    with Path(path).open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError("it is too large for a file of certificates")
    try:
        certificates = [base64.b64decode(match[1]) for match in _PEM.finditer(content)] or [content]
    except binascii.Error:
        raise ValueError("it is damaged") from None
    for certificate in certificates:
        _check(certificate)
    return certificates


def _check(certificate: bytes) -> None:
    """Raises ``ValueError`` for what OpenSSL does not take as one certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError):
        raise ValueError("it holds something else than certificates") from None


def _within_limits(certificates: Iterable[bytes]) -> tuple[tuple[bytes, ...], int]:
    """As many as fit, and how many do not."""
    taken: list[bytes] = []
    left = total = 0
    for certificate in certificates:
        if len(taken) < MAX_COUNT and total + len(certificate) <= MAX_TOTAL:
            taken.append(certificate)
            total += len(certificate)
        else:
            left += 1
    return tuple(taken), left
