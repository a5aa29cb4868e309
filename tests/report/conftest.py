"""A report with something in every field."""

from __future__ import annotations

import pytest

from vmferry.report.records import Downtime, Event, Faults, Report, Round, Verification


@pytest.fixture
def report() -> Report:
    return Report(
        guest="web",
        source="alpha",
        destination="beta",
        strategy="pre-copy",
        outcome="moved",
        changes=["The monitor's socket lies at /run/vmferry/web.qmp now."],
        downtime_ms=20.0,
        downtime=Downtime(20.0, 0.5, 0.5, 2.0, 3.0, 10.0, 1.0, 1.0),
        blackout_ms=24.25,
        readiness_s=1.2,
        total_s=1.22,
        pages_transferred=30_000,
        pages_total=131_072,
        bytes_on_wire=78 << 20,
        rounds=[Round(28_000, 70 << 20, 1.0, 2_000), Round(2_000, 8 << 20, 0.1, 0)],
        faults=Faults(12, 3, 4, 250.0, 900.0, 1200.0, 5.5, 0),
        verification=Verification(131_072, 0, 0.2),
        timeline=[
            Event(0.0, "attached", "source"),
            Event(0.1, "ready", "destination", "pid 7"),
            Event(1.05, "pushed", "source", "28000 pages"),
            Event(1.19, "pushed", "source", "2000 pages"),
            Event(1.2, "stopped", "source"),
            Event(1.215, "loaded", "destination"),
            Event(1.22, "resumed", "destination"),
            Event(1.23, "finished", "source"),
        ],
    )
