"""What a guest is made of, to tell a waiting destination that is not the same machine.

The command line is not the guest: devices are plugged in and out. Both sides' trees are compared
before the stop. Bus numbers and BARs are left out, because the guest's firmware sets them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from vmferry.guest.monitor import CommandFailed, Monitor
from vmferry.guest.qemu import DRAIN_NODE
from vmferry.guest.ramblocks import parse_ram_blocks

Tree = dict[str, list[str]]
"""Sorted entries by section; a section that a guest does not know is absent."""

_CONTAINERS = {
    "device": "/machine/peripheral",
    "unnamed device": "/machine/peripheral-anon",
    "object": "/objects",
    "character device": "/chardevs",
}
_NUMBERED = re.compile(r"\[\d+\]$")
_NETWORK_LINE = re.compile(r"^\s*\\?\s*(?P<name>[^:]+): (?P<rest>.*type=(?P<type>\w[\w-]*).*)$")
_NIC_FACTS = re.compile(r"(?:model|macaddr)=[^,\s]+")


async def object_tree(monitor: Monitor) -> Tree:
    """Devices, objects, disks, network, memory devices, CPUs and RAM blocks of a guest."""
    tree: Tree = {}
    for section, path in _CONTAINERS.items():
        await _ask(tree, section, lambda path=path: _children(monitor, path))
    await _ask(tree, "disk node", lambda: _nodes(monitor))
    await _ask(tree, "network", lambda: _network(monitor))
    await _ask(tree, "memory device", lambda: _memory_devices(monitor))
    await _ask(tree, "CPUs", lambda: _cpus(monitor))
    await _ask(tree, "RAM block", lambda: _blocks(monitor))
    return tree


def differences(source: Tree, destination: Tree) -> list[str]:
    """What only one side has, a sentence each; empty for the same machine."""
    found: list[str] = []
    for section in source:
        if section not in destination:
            continue
        ours, theirs = Counter(source[section]), Counter(destination[section])
        found += [f"{section} {entry} is only at the source" for entry in (ours - theirs)]
        found += [f"{section} {entry} is only at the destination" for entry in (theirs - ours)]
    return found


async def _ask(tree: Tree, section: str, read: Callable[[], Awaitable[list[str]]]) -> None:
    try:
        tree[section] = sorted(await read())
    except CommandFailed:
        # An unknown command or an absent container: nothing to compare.
        return


async def _children(monitor: Monitor, path: str) -> list[str]:
    found: list[str] = []
    for row in await monitor.rows("qom-list", {"path": path}):
        name, kind = str(row.get("name", "")), str(row.get("type", ""))
        # Monitors of the command line differ: the destination has one more, vmferry's own.
        if not kind.startswith("child<") or name.startswith("compat_monitor"):
            continue
        kind = kind.removeprefix("child<").removesuffix(">")
        found.append(f"({kind})" if _NUMBERED.search(name) else f"{name} ({kind})")
    return found


async def _nodes(monitor: Monitor) -> list[str]:
    rows = await monitor.rows("query-named-block-nodes", {"flat": True})
    found: list[str] = []
    for row in rows:
        name, driver = str(row.get("node-name", "")), str(row.get("drv", ""))
        if name == DRAIN_NODE:
            continue
        # QEMU makes names up for those that have none.
        found.append(f"({driver})" if name.startswith("#") else f"{name} ({driver})")
    return found


async def _network(monitor: Monitor) -> list[str]:
    found: list[str] = []
    for line in (await monitor.hmp("info network")).splitlines():
        match = _NETWORK_LINE.match(line)
        if match is None:
            continue
        name = "" if match["name"].startswith("#") else match["name"] + " "
        facts = _NIC_FACTS.findall(match["rest"]) if match["type"] == "nic" else []
        found.append(f"{name}({', '.join([match['type'], *facts])})")
    return found


async def _memory_devices(monitor: Monitor) -> list[str]:
    found: list[str] = []
    for row in await monitor.rows("query-memory-devices"):
        data = row.get("data")
        facts: Mapping[object, object] = data if isinstance(data, dict) else {}
        shown = [f"{key}={facts[key]}" for key in ("id", "addr", "memaddr", "size") if key in facts]
        found.append(f"{row.get('type')} ({', '.join(shown)})")
    return found


async def _cpus(monitor: Monitor) -> list[str]:
    return [f"({len(await monitor.rows('query-cpus-fast'))})"]


async def _blocks(monitor: Monitor) -> list[str]:
    text = str((await monitor.table("x-query-ramblock")).get("human-readable-text", ""))
    return [f"{row.name} ({row.used} bytes)" for row in parse_ram_blocks(text)]
