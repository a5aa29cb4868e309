"""The records that a move writes: progress while it runs, one report at its end."""

from __future__ import annotations

import msgspec


class Event(msgspec.Struct, frozen=True):
    """One line of the timeline."""

    at_s: float
    """Seconds since the move began."""
    name: str
    """A step of the move (`vmferry.engine.steps`), e.g. `stopped`."""
    side: str
    """`source` or `destination`."""
    detail: str = ""


class Round(msgspec.Struct, frozen=True):
    """One push of a strategy."""

    pages: int
    wire_bytes: int
    seconds: float
    dirty_pages: int
    """Pages found dirty by the scan that followed it."""


class Downtime(msgspec.Struct, frozen=True):
    """STOP at the source to RESUME at the destination, and its parts, in milliseconds."""

    total_ms: float
    stop_ms: float
    scan_ms: float
    push_ms: float
    """The last pages: read, sent, installed."""
    device_state_ms: float
    """Saving it at the source."""
    load_ms: float
    """Sending it and loading it at the destination."""
    commit_ms: float
    """Keeper, kill, proof, and the word to the destination."""
    start_ms: float
    """`cont` at the destination."""


class Faults(msgspec.Struct, frozen=True):
    """Demand paging at the destination (zeros for strategies without it)."""

    network_faults: int = 0
    prefetch_hits: int = 0
    zero_faults: int = 0
    fault_latency_us_p50: float = 0.0
    fault_latency_us_p99: float = 0.0
    fault_latency_us_max: float = 0.0
    guest_stall_ms: float = 0.0
    discarded_pages: int = 0


class Verification(msgspec.Struct, frozen=True):
    """`--verify`: the whole memory of both sides, page by page."""

    pages_compared: int
    pages_differing: int
    seconds: float
    """Taken inside the downtime for pre-copy, and not counted in it."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a move did and cost (design.md 5). Terms as the papers define them (papers.md 1)."""

    guest: str
    source: str
    destination: str
    strategy: str
    outcome: str
    """`moved`, `failed` or `cancelled`."""
    error: str = ""
    changes: list[str] = []
    """What the destination changed in the guest's command line, a sentence each."""
    downtime_ms: float = 0.0
    downtime: Downtime | None = None
    blackout_ms: float | None = None
    """Only where an outside client measured it."""
    readiness_s: float = 0.0
    recover_s: float = 0.0
    total_s: float = 0.0
    pages_transferred: int = 0
    zero_pages: int = 0
    pages_total: int = 0
    bytes_on_wire: int = 0
    bytes_by_encoding: dict[str, int] = {}
    rounds: list[Round] = []
    faults: Faults = Faults()
    verification: Verification | None = None
    device_state_bytes: int = 0
    engine_cpu_s: float = 0.0
    timeline: list[Event] = []


class Progress(msgspec.Struct, frozen=True):
    """A moment of a running move."""

    phase: str
    """What it is doing now, in words: `starting the destination`, `round 2`, `pulling`."""
    elapsed_s: float
    pages_pushed: int
    pages_remaining: int
    wire_bytes: int
    bytes_per_s: float
    expected_s: float | None
    """Seconds to the expected end; None where nothing can be said yet."""
