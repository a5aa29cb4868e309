"""The live progress of a move, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vmferry.report.records import Progress
from vmferry.report.units import rate

LINE_EVERY_S = 1.0
"""Without a terminal a line at most so often."""
REFRESH_PER_S = 10


class Display(Protocol):
    """Shows a running move."""

    def show(self, progress: Progress) -> None: ...
    def say(self, sentence: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None: ...


def make_display(title: str, *, quiet: bool = False) -> Display:
    """For the terminal, or lines where stderr is none."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal and not quiet:
        return TerminalDisplay(title, console)
    return LineDisplay(title, quiet=quiet)


def expected(seconds: float | None) -> str:
    """The expected end, in words."""
    if seconds is None:
        return ""
    return f"{seconds:.1f} s left" if seconds < 10 else f"{seconds:.0f} s left"


class TerminalDisplay:
    """One line that is drawn anew: phase, bar, rate, pages remaining, expected end."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._phase = ""
        self._most_remaining = 0
        self._live = Live(
            Text(f"{title}: starting"),
            console=console,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        )
        self._live.start()

    def show(self, progress: Progress) -> None:
        if progress.phase != self._phase:
            self._phase = progress.phase
            self._most_remaining = 0
        # A bar for each phase: its end is when nothing remains of the most that did.
        self._most_remaining = max(self._most_remaining, progress.pages_remaining)
        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(
            total=max(self._most_remaining, 1),
            completed=self._most_remaining - progress.pages_remaining,
            width=30,
        )
        line.add_row(
            f"{self._title}: {progress.phase}",
            bar,
            rate(progress.bytes_per_s, 1),
            f"{progress.pages_remaining:,} pages left",
            expected(progress.expected_s),
        )
        self._live.update(line)

    def say(self, sentence: str) -> None:
        self._live.console.print(sentence)

    def close(self) -> None:
        self._live.stop()


class LineDisplay:
    """Plain lines, for logs and pipes."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._next = 0.0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + LINE_EVERY_S
        parts = [
            f"{self._title}: {progress.phase}",
            f"{progress.elapsed_s:.1f} s",
            f"{progress.pages_pushed:,} pages sent",
            f"{progress.pages_remaining:,} left",
            rate(progress.bytes_per_s, 1),
            expected(progress.expected_s),
        ]
        self.say(", ".join(part for part in parts if part))

    def say(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass
