"""TLS 1.3 contexts: pinned certificates are the only anchors.

Built by hand and anew for each connection (about a millisecond), so that a pairing counts at once.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable

from vmferry.host.identity import Identity
from vmferry.host.peers import Peer


def _context(protocol: int, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.certificate_file, identity.key_file)
    return context


def server_context(identity: Identity, peers: Iterable[Peer]) -> ssl.SSLContext:
    """Only these peers come in, by their certificates."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.verify_mode = ssl.CERT_REQUIRED
    # No resumption: a session would outlive an unpairing.
    context.num_tickets = 0
    anchors = "".join(peer.certificate for peer in peers)
    if anchors:
        context.load_verify_locations(cadata=anchors)
    return context


def client_context(identity: Identity, peer: Peer) -> ssl.SSLContext:
    """Only this peer answers."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, identity)
    context.load_verify_locations(cadata=peer.certificate)
    return context


def joining_server_context(identity: Identity) -> ssl.SSLContext:
    """For pairing: the client is not known yet and proves itself by the token."""
    return _context(ssl.PROTOCOL_TLS_SERVER, identity)


def joining_client_context(identity: Identity) -> ssl.SSLContext:
    """For pairing: the caller compares the server's fingerprint before it says anything."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, identity)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
