"""What must hold of every strategy, for any guest, link and bounds: on the simulator."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.report.records import Report
from vmferry.simulator import Costs, GuestModel, LinkModel, Pattern, simulate
from vmferry.simulator.session import PAGE_WIRE_BYTES
from vmferry.strategies import METHODS, Bounds

NAMES = sorted(METHODS)
rates = st.sampled_from([0.0, 3.0, 100.0, 2500.0, 40000.0])


@st.composite
def guests(draw: st.DrawFn, *, growing: bool = True) -> GuestModel:
    pages = draw(st.integers(1, 3000))
    populated = draw(st.integers(0, pages))
    firmware = draw(st.integers(0, 40))
    reach = pages if growing else populated
    working_set = draw(st.integers(0, reach))
    hot = draw(st.integers(0, working_set))
    pattern = Pattern(
        working_set_pages=working_set,
        writes_per_s=draw(rates) if working_set else 0.0,
        reads_per_s=draw(rates) if working_set else 0.0,
        hot_pages=hot,
        hot_share=draw(st.sampled_from([0.0, 0.5, 0.9])) if hot else 0.0,
        firmware_writes_per_s=draw(rates) if firmware else 0.0,
    )
    return GuestModel(pages, populated, firmware, pattern)


links = st.builds(
    LinkModel,
    bytes_per_s=st.sampled_from([2e6, 12.5e6, 125e6, 1.25e9]),
    latency_s=st.sampled_from([0.0, 0.0001, 0.002, 0.02]),
)
all_bounds = st.builds(
    Bounds,
    max_downtime_s=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    max_rounds=st.integers(0, 12),
    max_total_factor=st.sampled_from([0.5, 1.0, 3.0]),
)
seeds = st.integers(0, 2**16)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(guest=guests(), link=links, bounds=all_bounds, seed=seeds)
def test_every_page_arrives_and_nothing_is_owed(
    name: str, guest: GuestModel, link: LinkModel, bounds: Bounds, seed: int
) -> None:
    """`simulate` itself raises where a page is lost, stale, sent into a running guest or owed."""
    report = simulate(name, guest, link, bounds, seed=seed)
    assert report.outcome == "moved"
    assert report.pages_transferred >= guest.populated_pages + guest.firmware_pages
    assert report.downtime is not None
    assert report.downtime.total_ms == pytest.approx(parts_ms(report), abs=1e-6)
    assert 0 <= report.readiness_s <= report.total_s
    events = report.timeline
    assert [e.at_s for e in events] == sorted(e.at_s for e in events)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(guest=guests(), link=links, bounds=all_bounds, seed=seeds)
def test_the_same_seed_gives_the_same_report(
    name: str, guest: GuestModel, link: LinkModel, bounds: Bounds, seed: int
) -> None:
    first = simulate(name, guest, link, bounds, seed=seed)
    assert simulate(name, guest, link, bounds, seed=seed) == first


@settings(max_examples=60, deadline=None)
@given(guest=guests(growing=False), link=links, bounds=all_bounds, seed=seeds)
def test_orderings_of_the_three(
    guest: GuestModel, link: LinkModel, bounds: Bounds, seed: int
) -> None:
    """A guest that does not grow (else pre-copy may have more to send at its end than
    stop-and-copy had at its beginning), and at least one round (else pre-copy is stop-and-copy)."""
    bounds = dataclasses.replace(bounds, max_rounds=max(1, bounds.max_rounds))
    pre, post, stop = (
        simulate(name, guest, link, bounds, seed=seed)
        for name in ("pre-copy", "post-copy", "stop-and-copy")
    )
    assert post.pages_transferred <= pre.pages_transferred
    assert stop.pages_transferred <= post.pages_transferred
    assert pre.downtime_ms <= stop.downtime_ms + 1e-6
    assert post.downtime_ms <= stop.downtime_ms + Costs().scan_s * 1e3 + 1e-6
    assert stop.total_s <= pre.total_s + 1e-9


@settings(max_examples=60, deadline=None)
@given(guest=guests(), link=links, seed=seeds)
def test_post_copy_sends_each_page_once(guest: GuestModel, link: LinkModel, seed: int) -> None:
    quiet = dataclasses.replace(guest.pattern, firmware_writes_per_s=0.0)
    guest = dataclasses.replace(guest, pattern=quiet)
    report = simulate("post-copy", guest, link, seed=seed)
    grown = report.pages_transferred - guest.populated_pages - guest.firmware_pages
    assert 0 <= grown <= max(0, quiet.working_set_pages - guest.populated_pages)
    assert report.bytes_on_wire == (
        report.pages_transferred * PAGE_WIRE_BYTES + report.device_state_bytes
    )


@settings(max_examples=60, deadline=None)
@given(
    pages=st.integers(256, 8000),
    share=st.floats(0.0, 0.5),
    max_downtime_s=st.sampled_from([0.02, 0.05, 0.3]),
    seed=seeds,
)
def test_pre_copy_converges_where_the_link_is_faster_than_the_writer(
    pages: int, share: float, max_downtime_s: float, seed: int
) -> None:
    link, costs = LinkModel(125e6, 0.0001), Costs()
    page_s = PAGE_WIRE_BYTES / link.bytes_per_s
    guest = GuestModel(pages, pages, 0, Pattern.uniform(pages, share / page_s))
    report = simulate("pre-copy", guest, link, Bounds(max_downtime_s), seed=seed, costs=costs)
    assert report.downtime is not None
    late = (guest.pattern.writes_per_s * costs.scan_s + 1) * page_s + 2 * link.latency_s
    assert report.downtime.push_ms / 1e3 <= max_downtime_s + late
    assert len(report.rounds) < Bounds().max_rounds


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(512, 3000),
    ratio=st.floats(3.0, 20.0),
    max_rounds=st.integers(1, 12),
    factor=st.sampled_from([1.0, 2.0, 3.0]),
    seed=seeds,
)
def test_pre_copy_ends_by_its_bounds_where_it_does_not_converge(
    pages: int, ratio: float, max_rounds: int, factor: float, seed: int
) -> None:
    link = LinkModel(12.5e6, 0.0001)
    writes = ratio * link.bytes_per_s / PAGE_WIRE_BYTES
    guest = GuestModel(pages, pages, 0, Pattern.uniform(pages, writes))
    bounds = Bounds(0.001, max_rounds, factor)
    report = simulate("pre-copy", guest, link, bounds, seed=seed)
    assert len(report.rounds) <= max_rounds + 1
    before_last = sum(r.pages for r in report.rounds[:-2])
    assert before_last < factor * pages
    assert report.rounds[-1].pages > pages / 2, "the writer kept most of it dirty"


def parts_ms(report: Report) -> float:
    d = report.downtime
    assert d is not None
    return (
        d.stop_ms + d.scan_ms + d.push_ms + d.device_state_ms + d.load_ms + d.commit_ms + d.start_ms
    )
