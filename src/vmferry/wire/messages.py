"""The control messages between two hosts, and between the command line and its daemon's host.

Each is a tagged, closed msgspec Struct, sent as one MessagePack frame of bounded length
(docs/protocol.md). Adding a field with a default is compatible; anything else needs a new
`PROTOCOL_VERSION`.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 80 << 20
"""Bound of one frame. The device state is the largest: 0.4 MB usually, 4.3 MB with virtio-vga."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages."""


class Hello(Message, tag="hello"):
    """First message of each side of a control connection."""

    protocol: int
    software: str
    host: str


class BlockShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block of the source: name, size in bytes, used bytes, page size of its mapping."""

    name: str
    length: int
    used: int
    page_size: int


class NetworkCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A NIC that sits on a tap in a bridge at the source."""

    mac: str
    tap: str
    bridge: str
    addresses: list[str] = []
    """IPv4 and IPv6 addresses that the guest was seen to use."""


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source's QEMU as it was started."""

    argv: list[str]
    exe: str
    cwd: str
    uid: int
    gid: int


class Offer(Message, tag="offer"):
    """Source: take this guest. Answered by Ready or Refuse."""

    move: str
    guest: str
    qemu_version: str
    machine: str
    process: Process
    blocks: list[BlockShape]
    cards: list[NetworkCard] = []
    demand_paging: bool
    verify: bool
    streams: int
    """Bulk page streams that will be opened, the urgent one not counted."""


class Ready(Message, tag="ready"):
    """Destination: its QEMU waits for the guest; open the page streams with this token."""

    token: bytes
    pid: int
    changes: list[str]


class Refuse(Message, tag="refuse"):
    """Destination: will not take it, and why; nothing is left behind."""

    reason: str


class Switch(Message, tag="switch"):
    """Source: the guest is stopped; draw its network traffic to your host now."""

    cards: list[NetworkCard] = []


class DeviceState(Message, tag="device-state"):
    """Source: load this. Answered by Loaded or LoadFailed."""

    data: bytes


class Loaded(Message, tag="loaded"):
    """Destination: the device state is loaded; waiting for the commit."""

    seconds: float


class LoadFailed(Message, tag="load-failed"):
    """Destination: its QEMU refused the device state or died; it is gone now."""

    reason: str


class Commit(Message, tag="commit"):
    """Source: fenced and proven gone; the guest is yours, run it. Answered by Resumed."""


class Resumed(Message, tag="resumed"):
    """Destination: the guest runs here. `at_ns` is its RESUME event on CLOCK_REALTIME."""

    at_ns: int
    start_seconds: float


class DigestRequest(Message, tag="digest-request"):
    """Source: send the digest vector of the memory (pre-copy), or of the pages as they were
    installed (post-copy)."""


class Digests(Message, tag="digests"):
    """Destination: 8 bytes a page, blocks in the order of the offer; `discarded` are ranges
    (block, start, stop) that the guest gave back while pages were missing."""

    data: bytes
    discarded: list[tuple[int, int, int]] = []


class FaultReport(Message, tag="fault-report"):
    """Destination: demand paging is over; what it cost."""

    network_faults: int
    prefetch_hits: int
    zero_faults: int
    fault_latency_us_p50: float
    fault_latency_us_p99: float
    fault_latency_us_max: float
    guest_stall_ms: float
    discarded_pages: int


class Finished(Message, tag="finished"):
    """Source: nothing depends on me any more. The destination answers Farewell."""


class Farewell(Message, tag="farewell"):
    """Destination: the move is over here too; `timeline` holds its events (realtime ns, name, detail)."""

    timeline: list[tuple[int, str, str]]
    cpu_seconds: float


class Abort(Message, tag="abort"):
    """Either side, before the commit: stop, undo, leave nothing. Answered by Aborted."""

    reason: str


class Aborted(Message, tag="aborted"):
    """Everything undone here."""


PeerMessage = (
    Hello
    | Offer
    | Ready
    | Refuse
    | Switch
    | DeviceState
    | Loaded
    | LoadFailed
    | Commit
    | Resumed
    | DigestRequest
    | Digests
    | FaultReport
    | Finished
    | Farewell
    | Abort
    | Aborted
)
