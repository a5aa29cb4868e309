"""Where this host's port is, as it is bound and as other hosts reach it."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses of documentation: a route to them is the default route; nothing is sent."""


@dataclass(frozen=True)
class Place:
    """The bound address and port; `advertised` is what the user says others reach it by."""

    address: str
    port: int
    advertised: str = ""

    def told_to_peers(self) -> tuple[str, int]:
        """The address is empty where the peer knows better: bound to every interface."""
        return self.advertised or ("" if self._is_wildcard() else self.address), self.port

    def reached_by(self) -> tuple[str, int]:
        """The best guess: of a wildcard, the address that the default route sends from."""
        address, port = self.told_to_peers()
        return address or _default_address() or socket.gethostname(), port

    def _is_wildcard(self) -> bool:
        try:
            return ipaddress.ip_address(self.address).is_unspecified
        except ValueError:
            return False


def _default_address() -> str:
    for family, elsewhere in _ELSEWHERE.items():
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((elsewhere, 9))
            except OSError:
                continue
            return sock.getsockname()[0]
    return ""
