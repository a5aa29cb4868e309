"""The timeline of a move as text: both sides merged, aligned, with the time between lines."""

from __future__ import annotations

from collections.abc import Sequence

from vmferry.report.records import Event, Report

STOPPED, RESUMED = "stopped", "resumed"
_SIDES = ("source", "destination")


def timeline(report: Report) -> str:
    """One line an event; `┃` marks the lines between the guest's stop and its resume.

    The first column is milliseconds since the move began, the second those since the line above.
    """
    events = sorted(report.timeline, key=lambda event: event.at_s)
    if not events:
        return "no events"
    marks = _downtime_marks(events)
    width = max(len(event.name) for event in events)
    # The destination's column lies far enough to the right to hold the source's names.
    width = max(width, len(_SIDES[0])) + 2
    lines = [f"{'ms':>11}  {'+ms':>9}   {_SIDES[0]:<{width}}{_SIDES[1]:<{width}}".rstrip()]
    before: float | None = None
    for event, mark in zip(events, marks, strict=True):
        delta = "" if before is None else f"{(event.at_s - before) * 1e3:+.3f}"
        column = " " * width if event.side == _SIDES[1] else ""
        name = f"{column}{event.name:<{width}}"
        name = f"{name:<{2 * width}}{event.detail}" if event.detail else name
        lines.append(f"{event.at_s * 1e3:>11.3f}  {delta:>9} {mark} {name}".rstrip())
        before = event.at_s
    return "\n".join(lines)


def _downtime_marks(events: Sequence[Event]) -> list[str]:
    marks, down = [], False
    for event in events:
        down = down or event.name == STOPPED
        marks.append("┃" if down else " ")
        if event.name == RESUMED:
            down = False
    # A guest that was stopped and never resumed stays marked to the end, and that is true.
    return marks
