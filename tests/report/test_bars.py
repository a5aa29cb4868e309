"""Bars and sparklines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.report.bars import Segment, bar, cells, sparkline, stacked


@pytest.mark.parametrize(
    ("value", "drawn"),
    [(0, ""), (0.001, "▏"), (25, "█"), (31.25, "█▎"), (100, "████"), (500, "████")],
)
def test_a_bar_has_eighths(value: float, drawn: str) -> None:
    assert bar(value, 100, 4) == drawn


def test_a_sparkline_rises() -> None:
    assert sparkline([0, 1, 2, 4, 8]) == " ▂▃▅█"
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "  "


parts = st.just(0.0) | st.floats(1e-6, 1e6)


@given(st.lists(parts, min_size=1, max_size=8), st.integers(8, 80))
def test_cells_fill_the_width_and_hide_nobody(values: list[float], width: int) -> None:
    shares = cells(values, width)
    if sum(values) == 0:
        assert sum(shares) == 0
        return
    assert sum(shares) == width
    assert all(share >= 1 for share, value in zip(shares, values, strict=True) if value > 0)
    assert all(share == 0 for share, value in zip(shares, values, strict=True) if value == 0)


def test_a_stacked_bar_is_styled_by_segment() -> None:
    text = stacked([Segment("a", 1, "red"), Segment("b", 3, "blue")], 8)
    assert text.plain == "█" * 8
    assert [(s.start, s.end, s.style) for s in text.spans] == [(0, 2, "red"), (2, 8, "blue")]
