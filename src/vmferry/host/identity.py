"""Who this host is: one self-signed certificate that its peers pin."""

from __future__ import annotations

import datetime
import hashlib
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path

from vmferry.errors import Refused
from vmferry.host.statefile import write_atomically

SERVER_NAME = "vmferry"
"""The DNS name in every host's certificate: peers are told apart by the certificate itself."""

VALID_DAYS = 20 * 365
CLOCK_SKEW_DAYS = 2
"""How far the clocks of two hosts may lie apart when the certificate is new."""


@dataclass(frozen=True)
class Identity:
    """This host's name, certificate and key (PEM), and the files that hold them."""

    name: str
    certificate: bytes
    key: bytes
    certificate_file: Path
    key_file: Path

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate."""
        return fingerprint(self.certificate)


def fingerprint(certificate: bytes) -> bytes:
    """SHA-256 of a PEM certificate's DER form, 32 bytes. ValueError when it is not one."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode("ascii"))).digest()
    except UnicodeDecodeError as error:
        raise ValueError("not a PEM certificate") from error


def normalised(certificate: str) -> str:
    """One certificate as PEM, and nothing else that stood in the text. ValueError for another
    thing than an end-entity certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    parsed = x509.load_pem_x509_certificate(certificate.encode())
    try:
        constraints = parsed.extensions.get_extension_for_class(x509.BasicConstraints)
    except x509.ExtensionNotFound:
        constraints = None
    if constraints is not None and constraints.value.ca:
        raise ValueError("a CA's certificate")
    return parsed.public_bytes(Encoding.PEM).decode()


def load_or_create(state_dir: Path, name: str) -> Identity:
    """The identity kept in `state_dir`; made at the first start. Refused when it cannot be read."""
    certificate_file = state_dir / "certificate.pem"
    key_file = state_dir / "key.pem"
    try:
        if not (certificate_file.exists() and key_file.exists()):
            certificate, key = _create()
            # The key first: a certificate without its key would be an identity that cannot speak.
            write_atomically(key_file, key, mode=0o600)
            write_atomically(certificate_file, certificate, mode=0o644)
        identity = Identity(
            name=name,
            certificate=certificate_file.read_bytes(),
            key=key_file.read_bytes(),
            certificate_file=certificate_file,
            key_file=key_file,
        )
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate_file, key_file)
    except (OSError, ValueError) as error:
        raise Refused(
            f"the certificate and key of this host in {state_dir} cannot be read or written; "
            "put them right, or remove both files and pair this host anew"
        ) from error
    return identity


def _create() -> tuple[bytes, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509.oid import NameOID

    key = Ed25519PrivateKey.generate()
    # A subject of its own: verifiers look anchors up by it, and several hosts' stand side by side.
    common_name = f"vmferry {secrets.token_hex(8)}"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=CLOCK_SKEW_DAYS))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        # webpki takes no CA certificate as an end entity.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, algorithm=None)
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
