"""Certificates made for a test, by an authority that nobody else knows."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import trustme

from shards.orders import TlsFiles


class Authority:
    """A CA, and the files of the certificates that it has issued; made when first asked for."""

    @functools.cached_property
    def _ca(self) -> trustme.CA:
        return trustme.CA()

    @functools.cached_property
    def _directory(self) -> Path:
        path = tempfile.mkdtemp(prefix="certificates")
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        return Path(path)

    @functools.cached_property
    def ca(self) -> str:
        """The file of the CA itself."""
        path = self._directory / "ca.pem"
        self._ca.cert_pem.write_to_path(path)
        return str(path)

    def files(self, name: str) -> TlsFiles:
        """A fresh certificate, whose files bear the name."""
        issued = self._ca.issue_cert(name)
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        certificate.write_bytes(chain)
        issued.private_key_pem.write_to_path(key)
        return TlsFiles(certificate=str(certificate), key=str(key), ca=self.ca)
