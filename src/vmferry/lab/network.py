"""The lab's networks, in network namespaces of its own.

    client c ── up0 ┐
                    ├── br0 in the switch s          10.77.0.0/24: the guests' network
    host a ──── up0 ┤   (each host: up0 and the guests' taps in a bridge br0 of its own)
    host b ──── up0 ┘

    host a ─ mig0 ══════════════════ mig0 ─ host b   10.88.0.0/30: the migration link, shaped

Everything here blocks for some milliseconds: call it through `asyncio.to_thread` (pyroute2's
blocking interface does not work inside a running loop).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pyroute2 import netns
from pyroute2.iproute.linux import NetNS

HostName = Literal["a", "b"]
HOSTS: tuple[HostName, HostName] = ("a", "b")
ROLES = (*HOSTS, "c", "s")
NAMESPACES = Path("/run/netns")
BRIDGE = "br0"
UPLINK = "up0"
MIGRATION_LINK = "mig0"
CLIENT_ADDRESS = "10.77.0.1"
MIGRATION_ADDRESS: dict[HostName, str] = {"a": "10.88.0.1", "b": "10.88.0.2"}

BURST_BYTES = 256 << 10
"""2 ms at 1 Gbit/s: what a switch port passes at line rate. It must hold a 64 KiB TSO frame."""
QUEUE_MS = 5
"""Longest wait in the shaper. 5 ms at 1 Gbit/s is 0.6 MB, the buffer of an ordinary switch port;
a deeper one would only measure itself, since every page asked for would queue behind it."""


class Topology:
    """Four namespaces `PREFIX-a`, `-b`, `-c` and `-s`, and what connects them."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def namespace(self, role: str) -> str:
        return f"{self.prefix}-{role}"

    def command(self, role: str) -> list[str]:
        """Words that run what follows them in a namespace (the process id stays the same)."""
        return ["nsenter", f"--net={NAMESPACES / self.namespace(role)}", "--"]

    def build(self) -> None:
        """OSError or NetlinkError when the kernel refuses; call `remove` then, too."""
        for role in ROLES:
            netns.create(self.namespace(role))
        for role in ROLES:
            with self._inside(role) as net:
                _up(net, "lo")
        with self._inside("s") as net:
            _add_bridge(net)
            for role in (*HOSTS, "c"):
                port = f"to-{role}"
                peer = {"ifname": UPLINK, "net_ns_fd": self.namespace(role)}
                net.link("add", ifname=port, kind="veth", peer=peer)
                _set(net, port, master=_index(net, BRIDGE))
                _up(net, port)
        with self._inside("c") as net:
            _up(net, UPLINK)
            net.addr("add", index=_index(net, UPLINK), address=CLIENT_ADDRESS, prefixlen=24)
        with self._inside("a") as net:
            peer = {"ifname": MIGRATION_LINK, "net_ns_fd": self.namespace("b")}
            net.link("add", ifname=MIGRATION_LINK, kind="veth", peer=peer)
        for host in HOSTS:
            with self._inside(host) as net:
                _add_bridge(net)
                _set(net, UPLINK, master=_index(net, BRIDGE))
                _up(net, UPLINK)
                index = _index(net, MIGRATION_LINK)
                net.addr("add", index=index, address=MIGRATION_ADDRESS[host], prefixlen=30)
                _up(net, MIGRATION_LINK)

    def join(self, host: HostName, tap: str) -> None:
        """Puts a tap that a QEMU has made into the host's bridge."""
        with self._inside(host) as net:
            _set(net, tap, master=_index(net, BRIDGE))
            _up(net, tap)

    def shape(self, rate_mbit: int | None) -> None:
        """Bounds the migration link both ways (`tc tbf`), or takes the bound away (None)."""
        for host in HOSTS:
            with self._inside(host) as net:
                index = _index(net, MIGRATION_LINK)
                if any(q.get("kind") == "tbf" for q in net.get_qdiscs(index=index)):
                    net.tc("del", index=index, root=True)
                if rate_mbit is not None:
                    net.tc(
                        "add",
                        "tbf",
                        index,
                        0x10000,
                        rate=f"{rate_mbit}mbit",
                        burst=BURST_BYTES,
                        latency=f"{QUEUE_MS}ms",
                    )

    def cut(self, *, restore: bool = False) -> None:
        """Takes the migration link down, or up again."""
        with self._inside("a") as net:
            _set(net, MIGRATION_LINK, state="up" if restore else "down")

    def links(self, role: str) -> list[str]:
        """Names of the interfaces in a namespace."""
        with self._inside(role) as net:
            return [str(link.get("ifname")) for link in net.get_links()]

    def migration_bytes(self) -> int:
        """Bytes that have gone over the migration link, both ways together.

        The kernel counts a large segment before it is cut, so headers are counted once for up to
        64 KiB: 4 % less than on a wire.
        """
        total = 0
        for host in HOSTS:
            with self._inside(host) as net:
                (link,) = net.get_links(_index(net, MIGRATION_LINK))
                total += link.get("stats64")["tx_bytes"]
        return total

    def processes(self, *roles: str) -> list[int]:
        """Everything that lives in these namespaces (in all of them by default)."""
        inodes = set()
        for role in roles or ROLES:
            path = NAMESPACES / self.namespace(role)
            if path.exists():
                inodes.add(path.stat().st_ino)
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                try:
                    inode = (process / "ns/net").stat().st_ino
                except OSError:
                    continue
                if inode in inodes:
                    found.append(int(process.name))
        return found

    def remove(self) -> None:
        """Removes the namespaces that are there, and with them all links in them."""
        for role in ROLES:
            if (NAMESPACES / self.namespace(role)).exists():
                netns.remove(self.namespace(role))

    @contextmanager
    def _inside(self, role: str) -> Generator[NetNS]:
        net = NetNS(self.namespace(role), flags=0)
        try:
            yield net
        finally:
            net.close()


def _add_bridge(net: NetNS) -> None:
    net.link("add", ifname=BRIDGE, kind="bridge", br_forward_delay=0)
    _up(net, BRIDGE)


def _up(net: NetNS, name: str) -> None:
    _set(net, name, state="up")


def _set(net: NetNS, name: str, **what: object) -> None:
    net.link("set", index=_index(net, name), **what)


def _index(net: NetNS, name: str) -> int:
    found = net.link_lookup(ifname=name)
    if not found:
        raise OSError(f"no interface {name} in this namespace of the lab")
    return found[0]
