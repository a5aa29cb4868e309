"""Bars and sparklines out of block characters, an eighth of a cell fine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar."""

    label: str
    value: float
    style: str


def bar(value: float, maximum: float, width: int) -> str:
    """A bar of `width` cells at `maximum`; anything above zero shows at least an eighth."""
    if value <= 0 or maximum <= 0:
        return ""
    eighths = max(1, round(min(1.0, value / maximum) * width * 8))
    whole, rest = divmod(eighths, 8)
    return _EIGHTHS[8] * whole + (_EIGHTHS[rest] if rest else "")


def sparkline(values: Sequence[float]) -> str:
    """One character a value, between zero and the largest; a space for zero."""
    top = max(values, default=0.0)
    return "".join(" " if value <= 0 else _LEVELS[min(7, int(value / top * 8))] for value in values)


def cells(values: Sequence[float], width: int) -> list[int]:
    """Whole cells of each value, `width` together, by largest remainder; a value above zero keeps
    one cell as long as there are cells enough."""
    total = sum(values)
    if total <= 0:
        return [0] * len(values)
    exact = [value / total * width for value in values]
    shares = [max(int(share), 1 if share > 0 else 0) for share in exact]
    by_remainder = sorted(range(len(values)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder:
        if sum(shares) >= width:
            break
        shares[index] += 1
    while sum(shares) > width:
        shares[shares.index(max(shares))] -= 1
    return shares


def stacked(segments: Sequence[Segment], width: int) -> Text:
    """One bar of `width` cells in which each segment has its share."""
    text = Text(no_wrap=True)
    shares = cells([segment.value for segment in segments], width)
    for segment, share in zip(segments, shares, strict=True):
        text.append("█" * share, style=segment.style)
    return text
