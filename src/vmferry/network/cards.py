"""The NICs of a moving guest: what the source knows of them, and what follows them.

Both sides prepare their sockets before the stop, so that drawing the traffic over at the stop, or
back after a failure, costs under a millisecond.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from vmferry.errors import Refused
from vmferry.network import taps
from vmferry.network.addresses import AddressWatch
from vmferry.network.announce import Announcer


@dataclass(frozen=True)
class Card:
    """A NIC on a tap that is a port of a bridge."""

    mac: str
    tap: str
    bridge: str


class SourceNetwork:
    """Watches which addresses the guest uses while it moves, and can draw its traffic back."""

    def __init__(self) -> None:
        self._cards: list[tuple[Card, AddressWatch, Announcer]] = []

    @classmethod
    async def watch(cls, nics: Sequence[tuple[str, str]]) -> SourceNetwork:
        """For NICs as (mac, tap) pairs; a tap outside any bridge is left alone. Refused without
        the right to raw sockets."""
        network = cls()
        try:
            for mac, tap in nics:
                bridge = await taps.bridge_of(tap)
                if bridge is None:
                    continue
                announcer = await Announcer.prepare(mac=mac, tap=tap, bridge=bridge)
                watch = AddressWatch(tap, mac)
                network._cards.append((Card(mac, tap, bridge), watch, announcer))
                await watch.start()
        except OSError as error:
            await network.close()
            raise Refused(
                f"the guest's network cannot be watched ({error}): the daemon needs CAP_NET_RAW "
                "and CAP_NET_ADMIN in the guest's network namespace"
            ) from error
        return network

    def cards(self) -> list[tuple[Card, list[str]]]:
        """Each card with the addresses seen until now."""
        return [(card, watch.addresses()) for card, watch, _ in self._cards]

    def draw_back(self) -> list[str]:
        """After a failed move: the traffic comes here again. Returns what did not work."""
        return [
            problem
            for _, watch, announcer in self._cards
            for problem in announcer.draw(watch.addresses())
        ]

    async def close(self) -> None:
        """Twice is harmless."""
        for _, watch, announcer in self._cards:
            await watch.close()
            announcer.close()
        self._cards = []


class DestinationNetwork:
    """Puts the waiting guest's taps into their bridges, and draws the traffic over at the stop."""

    def __init__(self) -> None:
        self._announcers: dict[str, Announcer] = {}

    @staticmethod
    async def refuse_if_missing(cards: Sequence[Card]) -> None:
        """Refused when a bridge is missing here, or a tap of that name is taken already."""
        for card in cards:
            if not await taps.bridge_exists(card.bridge):
                raise Refused(
                    f"the guest's NIC {card.mac} sits in bridge {card.bridge}, and this host has "
                    "none of that name; make it first"
                )
            if await taps.link_exists(card.tap):
                raise Refused(
                    f"the guest's tap is called {card.tap}, and this host has an interface of "
                    "that name already; remove it first"
                )

    @classmethod
    async def join(cls, cards: Sequence[Card]) -> DestinationNetwork:
        """After QEMU has made the taps: each goes into its bridge. GuestError."""
        network = cls()
        for card in cards:
            await taps.join(card.tap, card.bridge)
            network._announcers[card.mac] = await Announcer.prepare(
                mac=card.mac, tap=card.tap, bridge=card.bridge
            )
        return network

    def draw(self, mac: str, addresses: Sequence[str]) -> list[str]:
        """Draws one NIC's traffic here; returns what did not work."""
        with contextlib.suppress(KeyError):
            return self._announcers[mac].draw(addresses)
        return []

    def close(self) -> None:
        """Twice is harmless. The taps are QEMU's and end with it."""
        for announcer in self._announcers.values():
            announcer.close()
        self._announcers = {}
