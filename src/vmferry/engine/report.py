"""Makes the report of a move out of what the session, the sender and the destination counted."""

from __future__ import annotations

from vmferry._core import Progress as SenderProgress
from vmferry.engine.ports import MoveOrder
from vmferry.engine.session import EngineSession
from vmferry.engine.steps import Step, Timeline
from vmferry.report.records import Downtime, Faults, Report, Verification
from vmferry.wire.messages import Farewell


def make_report(
    *,
    order: MoveOrder,
    session: EngineSession,
    progress: SenderProgress,
    timeline: Timeline,
    farewell: Farewell,
    changes: list[str],
    verification: Verification | None,
    device_state_bytes: int,
    cpu_s: float,
) -> Report:
    """The report of a move that succeeded; the downtime excludes the time of `--verify`."""
    clock = session.clock
    in_downtime = clock.verify_s
    downtime_ms = (clock.resumed - clock.stopped - in_downtime) * 1e3
    faults = farewell.faults
    at = {event.name: event.at_s for event in timeline.events if event.side == "source"}
    return Report(
        guest=order.guest.name,
        source=order.source_host,
        destination=order.destination_host,
        strategy=order.method.name,
        outcome="moved",
        changes=changes,
        downtime_ms=downtime_ms,
        downtime=Downtime(
            total_ms=downtime_ms,
            stop_ms=clock.stop_s * 1e3,
            scan_ms=clock.scan_s * 1e3,
            push_ms=clock.push_s * 1e3,
            device_state_ms=clock.save_s * 1e3,
            load_ms=clock.load_s * 1e3,
            commit_ms=clock.commit_s * 1e3,
            start_ms=clock.start_s * 1e3,
        ),
        readiness_s=at[Step.STOPPED],
        recover_s=max(0.0, clock.pulled - clock.resumed) if clock.pulled else 0.0,
        total_s=max(at[Step.RESUMED], at.get(Step.PULLED, 0.0)) - in_downtime,
        pages_transferred=progress.pages,
        zero_pages=progress.zero_pages,
        pages_total=session.total_pages,
        bytes_on_wire=progress.wire_bytes + device_state_bytes,
        bytes_by_encoding=progress.by_encoding,
        rounds=session.rounds,
        faults=Faults(
            network_faults=faults.network_faults,
            prefetch_hits=faults.prefetch_hits,
            zero_faults=faults.zero_faults,
            fault_latency_us_p50=faults.latency_us_p50,
            fault_latency_us_p99=faults.latency_us_p99,
            fault_latency_us_max=faults.latency_us_max,
            guest_stall_ms=faults.stall_ms,
            discarded_pages=faults.discarded_pages,
        ),
        verification=verification,
        device_state_bytes=device_state_bytes,
        engine_cpu_s=cpu_s,
        timeline=sorted(timeline.events, key=lambda event: event.at_s),
    )
