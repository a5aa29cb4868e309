"""The hosts that this one trusts: names, addresses, pinned certificates."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vmferry.errors import Refused
from vmferry.host.identity import Identity, fingerprint
from vmferry.host.statefile import write_atomically


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A paired host: where its daemon listens, and its certificate (PEM)."""

    name: str
    address: str
    port: int
    certificate: str

    @property
    def fingerprint(self) -> bytes:
        return fingerprint(self.certificate.encode())


class PeerBook:
    """The paired hosts, kept in `peers.json` of the state directory."""

    def __init__(self, state_dir: Path, identity: Identity) -> None:
        """Refused when the file is there but cannot be read."""
        self._path = state_dir / "peers.json"
        self._identity = identity
        try:
            content = self._path.read_bytes()
            peers = msgspec.json.decode(content, type=list[Peer])
            self._peers = {peer.name: peer for peer in peers}
            self._by_fingerprint = {peer.fingerprint: peer for peer in peers}
        except FileNotFoundError:
            self._peers = {}
            self._by_fingerprint = {}
        except (OSError, ValueError, RecursionError) as error:
            raise Refused(
                f"the list of paired hosts in {self._path} cannot be read; "
                "put it right, or remove it and pair the hosts anew"
            ) from error

    def all(self) -> list[Peer]:
        """By name."""
        return sorted(self._peers.values(), key=lambda peer: peer.name)

    def find(self, name: str) -> Peer:
        """Refused when no host of that name is paired."""
        peer = self._peers.get(name)
        if peer is not None:
            return peer
        if name == self._identity.name:
            raise Refused(f"{name} is this host itself; name another one")
        known = ", ".join(sorted(self._peers)) or "none yet"
        raise Refused(
            f"no host {name} is paired with {self._identity.name} (paired: {known}); "
            f"run `vmferry invite` there and `vmferry pair TOKEN` here"
        )

    def by_fingerprint(self, certificate_sha256: bytes) -> Peer | None:
        return self._by_fingerprint.get(certificate_sha256)

    def check_addable(self, peer: Peer) -> None:
        """Refused when its name stands for another host; ValueError for a broken certificate."""
        if peer.fingerprint == self._identity.fingerprint:
            raise Refused(
                "a host cannot be paired with itself; run `vmferry pair` at the other one"
            )
        if peer.name == self._identity.name:
            raise Refused(
                f"both hosts are called {peer.name}; start one of them with `vmferry host --name`"
            )
        known = self._peers.get(peer.name)
        if known is not None and known.fingerprint != peer.fingerprint:
            raise Refused(
                f"{self._identity.name} is paired with another host called {peer.name} already; "
                f"run `vmferry unpair {peer.name}` at {self._identity.name} first, "
                "or start the new one with `vmferry host --name`"
            )

    def add(self, peer: Peer) -> None:
        """Adds it, or puts its new name and address in place of the old. Refused, ValueError."""
        self.check_addable(peer)
        kept = [p for p in self._peers.values() if p.fingerprint != peer.fingerprint]
        self._store([*kept, peer])

    def remove(self, name: str) -> None:
        """Refused when no host of that name is paired."""
        self.find(name)
        self._store([peer for peer in self._peers.values() if peer.name != name])

    def _store(self, peers: list[Peer]) -> None:
        try:
            write_atomically(self._path, msgspec.json.format(msgspec.json.encode(peers), indent=2))
        except OSError as error:
            raise Refused(
                f"the list of paired hosts {self._path} cannot be written ({error.strerror}); "
                "nothing was changed"
            ) from error
        self._peers = {peer.name: peer for peer in peers}
        self._by_fingerprint = {peer.fingerprint: peer for peer in peers}
