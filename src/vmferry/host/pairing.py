"""Two hosts come to trust each other by a one-time token that a person carries over.

The inviting host keeps a 128-bit secret for ten minutes; the token holds its address, the SHA-256
of its certificate, and the secret. The joining host connects, finds that certificate and no other,
and proves the secret by an HMAC over both certificates' fingerprints: so the proof is good for this
pair alone. Then each stores the other's certificate, name and address.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from vmferry.errors import FerryError, PeerError, Refused
from vmferry.host.channel import Frames
from vmferry.host.greeting import HELLO_LIMIT_S, Kind
from vmferry.host.identity import Identity, normalised
from vmferry.host.links import connect, start_tls
from vmferry.host.peers import Peer, PeerBook
from vmferry.host.tls import joining_client_context

TOKEN_VALID_S = 600.0
SECRET_BYTES = 16
FINGERPRINT_BYTES = 32
INVITATIONS_MAX = 32
PAIRING_MESSAGE_BYTES_MAX = 16 << 10
"""Read from somebody who has proven nothing yet; a certificate is under 1 KiB."""

_TOKEN_PREFIX = "vmferry1"
_PROOF_CONTEXT = b"vmferry pairing 1"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_NAME_RULE = (
    "up to 64 letters, digits, dots, dashes and underscores, a letter or digit first and last"
)


def check_host_name(name: str) -> str:
    """Refused unless it may stand as a host's name in commands and messages."""
    if _NAME.fullmatch(name) is None:
        raise Refused(f"{name!r} cannot be a host's name ({_NAME_RULE}); give one with --name")
    return name


class Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="join"):
    """The joining host shows itself; with an empty `address` the inviter takes the one it sees."""

    name: str
    address: str
    port: int
    certificate: str
    proof: bytes


class Joined(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="joined"):
    """The inviting host has stored it, and is called `name`."""

    name: str
    certificate: str


class Rejected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="rejected"):
    """The inviting host has not, and why."""

    reason: str


PairingMessage = Join | Joined | Rejected
_DECODER = msgspec.msgpack.Decoder(PairingMessage)


@dataclass(frozen=True)
class Token:
    """What `vmferry invite` prints."""

    address: str
    port: int
    fingerprint: bytes
    secret: bytes

    def __str__(self) -> str:
        secret = base64.urlsafe_b64encode(self.fingerprint + self.secret).decode()
        return f"{_TOKEN_PREFIX}/{format_address(self.address, self.port)}/{secret}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Refused when it is not a token."""
        try:
            prefix, place, encoded = text.strip().split("/")
            if prefix != _TOKEN_PREFIX:
                raise ValueError("another prefix")
            address, port = parse_address(place)
            secret = base64.b64decode(encoded, altchars=b"-_", validate=True)
            if len(secret) != FINGERPRINT_BYTES + SECRET_BYTES:
                raise ValueError("another length")
        except ValueError as error:
            raise Refused(
                "that is not a pairing token; copy the whole line that `vmferry invite` printed"
            ) from error
        return cls(address, port, secret[:FINGERPRINT_BYTES], secret[FINGERPRINT_BYTES:])


def format_address(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def parse_address(text: str) -> tuple[str, int]:
    """`ADDR:PORT`, `[V6]:PORT`. ValueError."""
    address, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not ADDR:PORT")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    if not address:
        raise ValueError(f"{text!r} names no address")
    return address, int(port)


def _proof(secret: bytes, inviter: bytes, joiner: bytes) -> bytes:
    return hmac.new(secret, _PROOF_CONTEXT + inviter + joiner, hashlib.sha256).digest()


class PairingDesk:
    """The inviting side: open invitations, and hosts that come with a token."""

    def __init__(
        self,
        identity: Identity,
        book: PeerBook,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tell` is given a sentence for each host that is paired or turned away."""
        self._identity = identity
        self._book = book
        self._tell = tell
        self._clock = clock
        self._secrets: dict[bytes, float] = {}

    def invite(self, address: str, port: int) -> Token:
        """A new token for one host, valid `TOKEN_VALID_S`. Refused when too many are open."""
        self._expire()
        if len(self._secrets) >= INVITATIONS_MAX:
            raise Refused(
                f"{INVITATIONS_MAX} invitations of {self._identity.name} are open already; "
                f"use one, or wait: each ends after {TOKEN_VALID_S / 60:.0f} minutes"
            )
        secret = secrets.token_bytes(SECRET_BYTES)
        self._secrets[secret] = self._clock() + TOKEN_VALID_S
        return Token(address, port, self._identity.fingerprint, secret)

    def is_open(self) -> bool:
        """Whether a host may come in to pair at all."""
        self._expire()
        return bool(self._secrets)

    async def admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one joining host. PeerError when it does not keep to the protocol."""
        frames = _frames(reader, writer, "the joining host")
        try:
            join = await frames.receive(HELLO_LIMIT_S)
            if not isinstance(join, Join):
                raise PeerError("it wants to pair, but began with another message")
            seen_address = writer.get_extra_info("peername")[0]
            try:
                self._accept(join, seen_address)
            except (Refused, ValueError) as error:
                reason = str(error) if isinstance(error, Refused) else "its certificate is broken"
                self._tell(f"A host that wanted to pair from {seen_address} was refused: {reason}")
                await frames.send(Rejected(reason))
                return
            self._tell(f"Paired with {join.name}.")
            await frames.send(Joined(self._identity.name, self._identity.certificate.decode()))
        finally:
            await frames.close()

    def _accept(self, join: Join, seen_address: str) -> None:
        peer = _peer(join.name, join.address or seen_address, join.port, join.certificate)
        self._expire()
        used = [
            secret
            for secret in self._secrets
            if hmac.compare_digest(
                join.proof, _proof(secret, self._identity.fingerprint, peer.fingerprint)
            )
        ]
        if not used:
            raise Refused(
                f"{self._identity.name} does not know this token: it was used, has expired after "
                f"{TOKEN_VALID_S / 60:.0f} minutes, or {self._identity.name} was started anew "
                "since; run `vmferry invite` there again"
            )
        self._book.add(peer)
        for secret in used:
            del self._secrets[secret]

    def _expire(self) -> None:
        now = self._clock()
        self._secrets = {secret: end for secret, end in self._secrets.items() if end > now}


async def join(token: Token, identity: Identity, book: PeerBook, address: str, port: int) -> Peer:
    """The joining side: pairs with the host of `token`; `address` may be empty (a wildcard).

    Refused or PeerError say why not; nothing is stored then here.
    """
    where = format_address(token.address, token.port)
    other = f"the inviting host at {where}"
    if token.fingerprint == identity.fingerprint:
        raise Refused("that token is this host's own; run `vmferry pair` at the other host")
    sock = await connect(token.address, token.port, Kind.JOIN, other)
    try:
        reader, writer = await start_tls(sock, joining_client_context(identity))
    except OSError as error:
        raise PeerError(
            f"{other} closed the connection: its invitation is not open any more, or it is "
            "another version of vmferry; run `vmferry invite` there again"
        ) from error
    frames = _frames(reader, writer, other)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if not hmac.compare_digest(hashlib.sha256(shown).digest(), token.fingerprint):
            raise PeerError(
                f"what answers at {where} is not the host that gave this token (its certificate "
                "is another); nothing was told to it. Check the address, and invite again"
            )
        proof = _proof(token.secret, token.fingerprint, identity.fingerprint)
        await frames.send(Join(identity.name, address, port, identity.certificate.decode(), proof))
        answer = await frames.receive(HELLO_LIMIT_S)
    finally:
        await frames.close()
    if isinstance(answer, Rejected):
        raise Refused(answer.reason)
    if not isinstance(answer, Joined):
        raise PeerError(f"{other} answered with another message; the hosts are not paired")
    try:
        peer = _peer(answer.name, token.address, token.port, answer.certificate)
        if peer.fingerprint != token.fingerprint:
            raise ValueError("another certificate than the token's")
        book.add(peer)
    except (ValueError, FerryError) as error:
        reason = str(error) if isinstance(error, FerryError) else "its answer is broken"
        raise Refused(
            f"{answer.name} has stored {identity.name}, but not the other way: {reason}"
        ) from error
    return peer


def _peer(name: str, address: str, port: int, certificate: str) -> Peer:
    """What a host said of itself, looked through. Refused, ValueError."""
    if _NAME.fullmatch(name) is None:
        raise Refused(f"the other host's name cannot be used ({_NAME_RULE})")
    if not 0 < port < 65536 or not 0 < len(address) < 256 or not address.isprintable():
        raise Refused(f"{name} named no usable address of its own")
    return Peer(name, address, port, normalised(certificate))


def _frames(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: str
) -> Frames[PairingMessage, PairingMessage]:
    return Frames(reader, writer, _DECODER, other=other, bound=PAIRING_MESSAGE_BYTES_MAX)
