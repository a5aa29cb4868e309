"""What the command line asks of its daemon, over the socket in the state directory.

One request a connection, then answers until one that is final. A `Cancel` may follow a `Move` on
the same connection. Command line and daemon are of one version: the first frame each way says so.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vmferry.report.records import Event, Progress, Report
from vmferry.wire.messages import Finding

API_VERSION = 1
SOCKET_NAME = "control.sock"
MESSAGE_BYTES_MAX = 4 << 20
"""A report with a long timeline is some tens of KiB."""
REQUEST_LIMIT_S = 5.0
"""For a client to say what it wants."""

RequestT = TypeVar("RequestT")


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all of them."""


# --- requests -----------------------------------------------------------------------------------


class Move(_Message, frozen=True, tag="move"):
    """Move `guest` (name, PID or QMP socket path) to the paired host `host`."""

    guest: str
    host: str
    strategy: str
    max_downtime_s: float
    verify: bool
    version: int = API_VERSION


class Cancel(_Message, frozen=True, tag="cancel"):
    """Cancel the move of `guest`; answered when it has been undone. On a Move's own connection:
    cancel that move; the Move's own final answer tells."""

    guest: str = ""
    version: int = API_VERSION


class List(_Message, frozen=True, tag="list"):
    """Guests, running moves and peers of this host."""

    version: int = API_VERSION


class Check(_Message, frozen=True, tag="check"):
    """Whether the paired host `host` is reached, and what it can do."""

    host: str
    version: int = API_VERSION


class Invite(_Message, frozen=True, tag="invite"):
    """A one-time token for another host. `address` overrides what this host believes others
    reach it by."""

    address: str = ""
    version: int = API_VERSION


class Pair(_Message, frozen=True, tag="pair"):
    """Pair with the host that gave this token."""

    token: str
    version: int = API_VERSION


class Unpair(_Message, frozen=True, tag="unpair"):
    """Forget a paired host."""

    host: str
    version: int = API_VERSION


Request = Move | Cancel | List | Check | Invite | Pair | Unpair


# --- answers ------------------------------------------------------------------------------------


class Moment(_Message, frozen=True, tag="moment"):
    """A moment of the running move."""

    progress: Progress


class Happened(_Message, frozen=True, tag="happened"):
    """A line of the running move's timeline."""

    event: Event


class Line(_Message, frozen=True, tag="line"):
    """A line for the user; more follow."""

    text: str


class Ended(_Message, frozen=True, tag="ended"):
    """Final: how the move ended."""

    report: Report


class GuestLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A guest on this host."""

    name: str
    pid: int
    state: str


class PeerLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A paired host."""

    name: str
    address: str
    port: int


class Listing(_Message, frozen=True, tag="listing"):
    """Final: the answer to List."""

    host: str
    address: str
    port: int
    guests: list[GuestLine]
    peers: list[PeerLine]


class Findings(_Message, frozen=True, tag="findings"):
    """Final: the answer to Check."""

    findings: list[Finding]


class Done(_Message, frozen=True, tag="done"):
    """Final: it is done; `text` says what."""

    text: str


class Failed(_Message, frozen=True, tag="failed"):
    """Final: it is not; `kind` is the class of `vmferry.errors`, `sentence` its message."""

    kind: str
    sentence: str


Answer = Moment | Happened | Line | Ended | Listing | Findings | Done | Failed

REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
