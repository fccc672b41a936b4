"""The TLS context for a connection: verified, TLS 1.2 or later, unless the user says otherwise."""

from __future__ import annotations

import base64
import binascii
import errno
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from leveret.log import get_logger, printable

if TYPE_CHECKING:
    from leveret.url import ConnectionParameters

_log = get_logger(__name__)


def create_context(parameters: ConnectionParameters) -> ssl.SSLContext:
    """Make the context that *parameters* describe.

    The system's CA certificates are trusted, unless a CA file, directory or text is given: then only those.
    ``parameters.verify`` False switches off every check of the server's identity, and logs a warning.

    Raises:
        FileNotFoundError: A file or directory does not exist; names it.
        ValueError: A file or ``cadata`` does not hold what it should; names it.
    """
    _must_exist(parameters)
    try:
        context = ssl.create_default_context(
            cafile=parameters.cafile,
            capath=parameters.capath,
            cadata=_cadata(parameters.cadata) if parameters.cadata else None,
        )
    except ssl.SSLError as error:
        source = f"cafile {parameters.cafile!r}" if parameters.cafile else "cadata"
        raise ValueError(f"{source} holds no usable CA certificate: {error}") from error
    if context.minimum_version < ssl.TLSVersion.TLSv1_2:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not parameters.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        _log.warning("the certificate of %s is not verified: anybody can pose as it", printable(parameters.host))
    if parameters.certfile:
        _load_client_certificate(context, parameters.certfile, parameters.keyfile)
    return context


def _must_exist(parameters: ConnectionParameters) -> None:
    # OpenSSL does not name the file, and takes a missing capath without a word.
    for name in ("cafile", "capath", "certfile", "keyfile"):
        path: str | None = getattr(parameters, name)
        if path and not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, f"{name} does not exist", path)
    if parameters.keyfile and not parameters.certfile:
        raise ValueError(f"keyfile {parameters.keyfile!r} needs a certfile")


def _cadata(text: str) -> str | bytes:
    """PEM text as it is; base64, of DER (as in aio-pika) or of PEM, decoded."""
    if "-----BEGIN" in text:
        return text
    try:
        # A `+` that was not percent-encoded arrives from the URL as a space.
        data = base64.b64decode("".join(text.strip().replace(" ", "+").split()), validate=True)
    except binascii.Error:
        raise ValueError("cadata is neither PEM text nor base64") from None
    return data.decode("ascii") if data.startswith(b"-----BEGIN") else data


def _load_client_certificate(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    def password() -> NoReturn:
        # Without this OpenSSL would ask on the terminal, and block the event loop meanwhile.
        raise ValueError(f"the key in {keyfile or certfile!r} is encrypted: give a decrypted one, or an SSLContext")

    try:
        context.load_cert_chain(certfile, keyfile, password)
    except ssl.SSLError as error:
        raise ValueError(
            f"certfile {certfile!r} and keyfile {keyfile!r} hold no matching certificate and key: {error}"
        ) from error
