"""Laws that the papers state, asked of the strategies on the simulator."""

from __future__ import annotations

import pytest

from vmferry.simulator import Costs, GuestModel, LinkModel, Pattern, simulate
from vmferry.simulator.session import PAGE_WIRE_BYTES
from vmferry.strategies import Bounds

FREE = Costs(0, 0, 0, 0, 0, 0, 0)
MIB = 256
"""Pages."""


@pytest.mark.parametrize(("mbit", "seconds"), [(128, 32), (256, 16), (512, 8)])
def test_stop_and_copy_takes_size_over_bandwidth(mbit: int, seconds: int) -> None:
    """Clark et al. 2005, section 4.2: 512 MB stop for 32, 16 and 8 s (1 Mbit is 2^20 there)."""
    guest = GuestModel(512 * MIB, 512 * MIB, 0)
    link = LinkModel(mbit * 2**20 / 8 * PAGE_WIRE_BYTES / 4096, 0.0)
    report = simulate("stop-and-copy", guest, link, costs=FREE)
    assert report.downtime_ms == pytest.approx(seconds * 1e3, rel=1e-9)


@pytest.mark.parametrize("working_set_mib", [4, 16, 64])
def test_pre_copy_of_a_fast_writer_stops_for_its_working_set(working_set_mib: int) -> None:
    """Hines and Gopalan 2009, Figs 6 and 7: downtime follows the working set, w * 8.39 / 890 s
    here at Gigabit, and each round sends all of it again."""
    pages = 256 * MIB
    working_set = working_set_mib * MIB
    link = LinkModel(890e6 / 8 * PAGE_WIRE_BYTES / 4096, 0.0)
    guest = GuestModel(pages, pages, 0, Pattern.uniform(working_set, 2e5))
    report = simulate("pre-copy", guest, link, Bounds(0.001, max_rounds=7), costs=FREE)
    assert report.downtime_ms == pytest.approx(working_set_mib * 8.39 / 890 * 1e3, rel=0.03)
    assert report.pages_transferred == pytest.approx(pages + 7 * working_set, rel=0.01)


@pytest.mark.parametrize("working_set_mib", [8, 512])
def test_post_copy_sends_the_guest_once_whatever_it_writes(working_set_mib: int) -> None:
    """The same figures: 524,288 pages whatever the working set, read or written."""
    pages = 2048 * MIB
    pattern = Pattern.uniform(working_set_mib * MIB, 3000.0, 3000.0)
    guest = GuestModel(pages, pages, 0, pattern)
    report = simulate("post-copy", guest, LinkModel(111e6, 0.0001))
    assert report.pages_transferred == pages
    assert report.downtime_ms < 20
    assert report.faults.network_faults > 0
    assert report.faults.guest_stall_ms > 0


def test_an_urgent_page_waits_for_little() -> None:
    """A fault costs a round trip, one bulk message and its own page; never the whole queue."""
    pages = 64 * MIB
    link = LinkModel(125e6, 0.0001)
    guest = GuestModel(pages, pages, 0, Pattern.uniform(pages, 0.0, 4000.0))
    report = simulate("post-copy", guest, link, seed=3)
    bulk_s = 16 * PAGE_WIRE_BYTES / link.bytes_per_s
    limit_s = 2 * link.latency_s + bulk_s + 2 * PAGE_WIRE_BYTES / link.bytes_per_s
    assert report.faults.network_faults > 100
    assert report.faults.fault_latency_us_max <= limit_s * 1e6


def test_pre_copy_of_an_idle_guest_sends_it_once_and_stops_for_nothing() -> None:
    guest = GuestModel(8 * MIB, 5 * MIB, 10)
    report = simulate("pre-copy", guest, LinkModel())
    assert report.pages_transferred == 5 * MIB + 10
    assert [(r.pages, r.dirty_pages) for r in report.rounds] == [(5 * MIB + 10, 0), (0, 0)]
    assert report.downtime is not None
    assert report.downtime.push_ms == 0
