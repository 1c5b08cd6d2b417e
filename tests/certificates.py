"""Certificates for tests, made by this machine's openssl."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """A certificate that is its own authority, and its key, as PEM files."""

    path: Path
    key: Path

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.path.read_text())


def make(folder: Path, name: str, *alternatives: str) -> Certificate:
    """One of the subject ``name`` that is good for a server of it and of ``alternatives`` (``DNS:...``, ``IP:...``)."""
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    # fmt: off
    command = [
        "openssl", "req", "-x509", "-nodes",
        "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-days", "3650",
        "-subj", f"/CN={name}",
        "-addext", f"subjectAltName={','.join([f'DNS:{name}', *alternatives])}",
        "-keyout", str(made.key),
        "-out", str(made.path),
    ]
    # fmt: on
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return made
