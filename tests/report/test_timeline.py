"""The timeline as text."""

from __future__ import annotations

import msgspec

from vmferry.report.records import Report
from vmferry.report.timeline import timeline

EXPECTED = """\
         ms        +ms   source    destination
      0.000              attached
    100.000   +100.000             ready     pid 7
   1050.000   +950.000   pushed              28000 pages
   1190.000   +140.000   pushed              2000 pages
   1200.000    +10.000 ┃ stopped
   1215.000    +15.000 ┃           loaded
   1220.000     +5.000 ┃           resumed
   1230.000    +10.000   finished"""


def test_both_sides_stand_in_their_columns_with_the_downtime_marked(report: Report) -> None:
    assert timeline(report) == EXPECTED


def test_events_are_put_in_order_of_time(report: Report) -> None:
    mixed = msgspec.structs.replace(report, timeline=report.timeline[::-1])
    assert timeline(mixed) == EXPECTED


def test_a_guest_that_never_resumed_stays_marked(report: Report) -> None:
    cut = msgspec.structs.replace(
        report, timeline=[e for e in report.timeline if e.name != "resumed"]
    )
    assert [line[22:25].strip() for line in timeline(cut).splitlines()[5:]] == ["┃", "┃", "┃"]


def test_no_events_is_said(report: Report) -> None:
    assert timeline(msgspec.structs.replace(report, timeline=[])) == "no events"
