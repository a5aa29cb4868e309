"""What the lab reads from a guest's console."""

from __future__ import annotations

from vmferry.lab.guests import GuestCounts, Load, read_counts


def test_the_last_counts_are_taken() -> None:
    text = (
        "LOAD-READY 128,40,text\r\nTICK 1 written 10 corrupt 0\r\nDISK operations 4 bad 0\r\n"
        "TICK 2 written 20 corrupt 0\r\nTICK 3 writ"
    )
    assert read_counts(text) == GuestCounts(2, 20, 0, 4, 0, 0)


def test_complaints_count_before_the_next_tick() -> None:
    complaints = ["CORRUPT page 7 holds number 1", "DISKBAD block 3", "DIED 9 status 0"]
    text = "\n".join(["TICK 1 written 10 corrupt 0", *complaints, ""])
    counts = read_counts(text)
    assert (counts.corrupt, counts.disk_bad, counts.died) == (1, 1, 1)


def test_an_empty_console_counts_nothing() -> None:
    assert read_counts("") == GuestCounts(0, 0, 0)


def test_a_load_is_told_to_the_guest_in_words() -> None:
    assert str(Load(64, 10, "zeros")) == "64,10,zeros"
