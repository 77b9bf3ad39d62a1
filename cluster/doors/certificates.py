"""Certificates of a door: from PEM files to what a listening socket needs."""

from __future__ import annotations

import ssl
from pathlib import Path

from batching.errors import FailedPrecondition
from cluster.doors.settings import Tls

__all__ = ["server_context"]


def server_context(tls: Tls) -> tuple[ssl.SSLContext, tuple[Path, ...]]:
    """A context for the server's side, TLS 1.2 or newer, and the files that it was made from.

    Raises:
        FailedPrecondition: a file cannot be read, or they do not belong together. The message
            names files and holds nothing of what is in them.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    files = [Path(tls.certificate), Path(tls.key)]
    try:
        # A key that wants a password would otherwise ask for it on a terminal.
        context.load_cert_chain(tls.certificate, tls.key, password="")
        if tls.client_ca:
            files.append(Path(tls.client_ca))
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(tls.client_ca)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        names = ", ".join(map(str, files))
        raise FailedPrecondition(f"certificates {names}: {reason}") from None
    return context, tuple(files)
