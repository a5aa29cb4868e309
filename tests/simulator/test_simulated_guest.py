"""The simulated guest: a function of its seed and of the time it ran."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.simulator.guest import RAM, GuestModel, Pattern, SimulatedGuest, runs

MODEL = GuestModel(512, 300, 8, Pattern(256, 700.0, 300.0, 16, 0.8, 5.0))


@given(st.integers(0, 1000), st.lists(st.floats(0, 0.3), max_size=12))
def test_how_often_somebody_looks_changes_nothing(seed: int, steps: list[float]) -> None:
    often, once = SimulatedGuest(MODEL, seed), SimulatedGuest(MODEL, seed)
    total = 0.0
    for step in steps:
        often.run(step)
        total += step
    once.run(total)
    assert often.versions == once.versions
    assert often.written == once.written


def test_seeds_differ() -> None:
    first, second = SimulatedGuest(MODEL, 1), SimulatedGuest(MODEL, 2)
    first.run(0.2)
    second.run(0.2)
    assert first.written != second.written


def test_it_writes_at_its_rate_and_inside_its_working_set() -> None:
    guest = SimulatedGuest(MODEL, 3)
    guest.run(0.5)
    before = SimulatedGuest(MODEL, 3)
    writes = sum(guest.versions[RAM]) - sum(before.versions[RAM])
    assert writes == 350
    assert max(guest.written[RAM]) < 256
    hot = sum(guest.versions[RAM][:16]) - 16
    assert hot > writes * 0.7


def test_a_long_time_writes_the_whole_working_set() -> None:
    guest = SimulatedGuest(MODEL, 3)
    guest.run(1e6)
    assert guest.written[RAM] == set(range(256))


def test_an_idle_guest_writes_nothing() -> None:
    guest = SimulatedGuest(GuestModel(64, 32), 1)
    guest.run(1e6)
    assert guest.take_written() == [[], []]


@given(st.sets(st.integers(0, 60)))
def test_runs_are_maximal_and_whole(pages: set[int]) -> None:
    found = runs(pages)
    assert {page for start, stop in found for page in range(start, stop)} == pages
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("pages", "populated", "pattern"),
    [(10, 11, Pattern()), (10, 5, Pattern(11, 1.0)), (10, 5, Pattern(writes_per_s=1.0))],
)
def test_a_guest_that_cannot_be_is_refused(pages: int, populated: int, pattern: Pattern) -> None:
    with pytest.raises(ValueError, match=r"must|need"):
        GuestModel(pages, populated, 0, pattern)
