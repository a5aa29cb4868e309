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


class Hello(Message, frozen=True, tag="hello"):
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


class Offer(Message, frozen=True, kw_only=True, tag="offer"):
    """Source: take this guest. Answered by Expecting and Ready, or by Refuse."""

    move: str
    guest: str
    qemu_version: str
    machine: str
    process: Process
    blocks: list[BlockShape]
    tree: dict[str, list[str]]
    """What the guest is made of (`vmferry.guest.tree`), for the destination to compare."""
    cards: list[NetworkCard] = []
    demand_paging: bool
    verify: bool
    running: bool
    """Whether the guest runs now; a paused guest stays paused at the destination."""
    streams: int
    """Bulk page streams that will be opened, the urgent one not counted."""


class Expecting(Message, tag="expecting", frozen=True):
    """Destination: open the page streams with this token, while the QEMU here starts."""

    token: bytes


class Ready(Message, tag="ready", frozen=True):
    """Destination: its QEMU waits for the guest."""

    pid: int
    changes: list[str]


class Refuse(Message, frozen=True, tag="refuse"):
    """Destination: will not take it, and why; nothing is left behind."""

    reason: str


class Switch(Message, frozen=True, tag="switch"):
    """Source: the guest is stopped; draw its network traffic to your host now."""

    cards: list[NetworkCard] = []


class DeviceState(Message, frozen=True, tag="device-state"):
    """Source: load this. Answered by Loaded or LoadFailed."""

    data: bytes


class Loaded(Message, frozen=True, tag="loaded"):
    """Destination: the device state is loaded; waiting for the commit."""


class LoadFailed(Message, frozen=True, tag="load-failed"):
    """Destination: its QEMU refused the device state or died; it is gone now."""

    reason: str


class Commit(Message, frozen=True, tag="commit"):
    """Source: fenced and proven gone; the guest is yours, run it. Answered by Resumed."""


class Resumed(Message, frozen=True, tag="resumed"):
    """Destination: the guest runs here."""

    ago_s: float
    """Seconds from the guest's RESUME event to the sending of this message."""
    start_s: float
    """Seconds from the receipt of Commit to the RESUME event."""


class DigestRequest(Message, frozen=True, tag="digest-request"):
    """Source: send the digest vector of the memory (pre-copy), or of the pages as they were
    installed (post-copy)."""


class Digests(Message, frozen=True, tag="digests"):
    """Destination: 8 bytes a page, blocks in the order of the offer; `discarded` are ranges
    (block, start, stop) that the guest gave back while pages were missing."""

    data: bytes
    discarded: list[tuple[int, int, int]] = []


class Finished(Message, frozen=True, tag="finished"):
    """Source: nothing depends on me any more. The destination answers Farewell."""


class FaultCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What demand paging cost at the destination."""

    network_faults: int = 0
    prefetch_hits: int = 0
    zero_faults: int = 0
    latency_us_p50: float = 0.0
    latency_us_p99: float = 0.0
    latency_us_max: float = 0.0
    stall_ms: float = 0.0
    discarded_pages: int = 0


class PastEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event of the destination's timeline: `ago_s` before this message was sent, so that the
    clocks of the two hosts need not agree."""

    ago_s: float
    name: str
    detail: str = ""


class Farewell(Message, frozen=True, tag="farewell"):
    """Destination: the move is over here too."""

    faults: FaultCosts
    timeline: list[PastEvent]
    cpu_seconds: float


class Abort(Message, frozen=True, tag="abort"):
    """Either side, before the commit: stop, undo, leave nothing. Answered by Aborted."""

    reason: str


class Aborted(Message, frozen=True, tag="aborted"):
    """Everything undone here."""


class Verdict(Message, frozen=True, tag="verdict"):
    """Source, first message of a new control connection: how a move ended whose connection broke
    between Loaded and Resumed. Answered by Resumed (committed) or Aborted (not), or Refuse when
    no such move waits."""

    move: str
    committed: bool


class Survey(Message, frozen=True, tag="survey"):
    """Source, first message of a control connection: what can your machine do?"""


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that a machine has or lacks; `remedy` says what to do where it is not `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


class Surveyed(Message, frozen=True, tag="surveyed"):
    """Destination: the answer to Survey."""

    findings: list[Finding]


PeerMessage = (
    Hello
    | Offer
    | Expecting
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
    | Finished
    | Farewell
    | Abort
    | Aborted
    | Verdict
    | Survey
    | Surveyed
)
