"""Taps and bridges of this process's network namespace, over netlink."""

from __future__ import annotations

import errno

from pyroute2.iproute.linux import AsyncIPRoute
from pyroute2.netlink import nlmsg
from pyroute2.netlink.exceptions import NetlinkError

from vmferry.errors import GuestError


async def bridge_of(tap: str) -> str | None:
    """The bridge that `tap` is a port of; None when it is in none. GuestError: no such tap."""
    async with AsyncIPRoute() as netlink:
        links = {link["index"]: link async for link in await netlink.get_links()}
    for link in links.values():
        if link.get("ifname") == tap:
            master = links.get(link.get("master"))
            if master is None or _kind(master) != "bridge":
                return None
            return master.get("ifname")
    raise GuestError(f"There is no network interface {tap} on this host.")


async def bridge_exists(bridge: str) -> bool:
    """Whether this host has a bridge of that name."""
    async with AsyncIPRoute() as netlink:
        async for link in await netlink.get_links():
            if link.get("ifname") == bridge:
                return _kind(link) == "bridge"
    return False


async def link_exists(name: str) -> bool:
    """Whether this host has a network interface of that name, of whatever kind."""
    async with AsyncIPRoute() as netlink:
        return bool(await netlink.link_lookup(ifname=name))


async def join(tap: str, bridge: str) -> None:
    """Makes `tap` a port of `bridge` and takes it up. GuestError when the kernel refuses."""
    async with AsyncIPRoute() as netlink:
        tap_index = await _index(netlink, tap)
        bridge_index = await _index(netlink, bridge)
        try:
            await netlink.link("set", index=tap_index, master=bridge_index)
            await netlink.link("set", index=tap_index, state="up")
        except NetlinkError as error:
            why = errno.errorcode.get(error.code, str(error.code))
            raise GuestError(f"Tap {tap} could not be put into bridge {bridge} ({why}).") from error


async def uplinks(bridge: str) -> list[str]:
    """Ports of `bridge` that lead to other machines: all that are not taps, in order of index.

    GuestError: no such bridge.
    """
    async with AsyncIPRoute() as netlink:
        bridge_index = await _index(netlink, bridge)
        return [
            link.get("ifname")
            async for link in await netlink.get_links()
            if link.get("master") == bridge_index and _kind(link) != "tun"
        ]


async def _index(netlink: AsyncIPRoute, name: str) -> int:
    found = await netlink.link_lookup(ifname=name)
    if not found:
        raise GuestError(f"There is no network interface {name} on this host.")
    return found[0]


def _kind(link: nlmsg) -> str | None:
    return link.get(("linkinfo", "kind"))
