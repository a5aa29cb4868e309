"""A guest: pages, and a pattern of accesses that a seed determines.

The guest is a pure function of its seed and of the time for which it has run: whoever looks at it,
and how often, changes nothing. So two strategies meet the very same guest.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

RAM, FIRMWARE = 0, 1
"""Indices of its two blocks: one that is demand-paged, one that must be in place before."""

SATURATION = 32
"""Draws a page of a set after which none is left out (e^-32 of them are, else)."""


@dataclass(frozen=True)
class Pattern:
    """Accesses of a running guest to its RAM, from page 0 of it on."""

    working_set_pages: int = 0
    writes_per_s: float = 0.0
    reads_per_s: float = 0.0
    hot_pages: int = 0
    """The first pages of the working set, which take `hot_share` of all accesses."""
    hot_share: float = 0.0
    firmware_writes_per_s: float = 0.0
    """Writes to the other block (video memory), uniform."""

    @classmethod
    def idle(cls) -> Pattern:
        """Touches nothing."""
        return cls()

    @classmethod
    def uniform(cls, pages: int, writes_per_s: float, reads_per_s: float = 0.0) -> Pattern:
        """All pages of the working set alike."""
        return cls(pages, writes_per_s, reads_per_s)

    @classmethod
    def hot_cold(
        cls, pages: int, writes_per_s: float, reads_per_s: float = 0.0, *, hot: float = 0.1
    ) -> Pattern:
        """Nine accesses in ten go to that fraction of the working set."""
        hot_pages = max(1, round(pages * hot))
        return cls(pages, writes_per_s, reads_per_s, hot_pages=hot_pages, hot_share=0.9)


@dataclass(frozen=True)
class GuestModel:
    """A guest as it is before a move."""

    pages: int = 16384
    populated_pages: int = 16384
    """The first pages of RAM, which hold something; the rest was never touched."""
    firmware_pages: int = 64
    pattern: Pattern = field(default_factory=Pattern)

    def __post_init__(self) -> None:
        pattern = self.pattern
        if not 0 <= self.populated_pages <= self.pages or self.pages < 1:
            raise ValueError("populated_pages must lie between 0 and pages")
        if not 0 <= pattern.hot_pages <= pattern.working_set_pages <= self.pages:
            raise ValueError("hot_pages <= working_set_pages <= pages must hold")
        if pattern.writes_per_s + pattern.reads_per_s > 0 and not pattern.working_set_pages:
            raise ValueError("accesses need a working set")
        if pattern.firmware_writes_per_s > 0 and not self.firmware_pages:
            raise ValueError("writes to the firmware block need pages of it")

    @property
    def shape(self) -> list[int]:
        """Pages of each block."""
        return [self.pages, self.firmware_pages]


class SimulatedGuest:
    """A guest that runs or stands, with a version number a page in place of content.

    Version 0 is a page never touched; each write makes another. `written` collects what the
    tracking of a real host would see: pages written since somebody took the set away.
    """

    def __init__(self, model: GuestModel, seed: int) -> None:
        self.model = model
        self.versions = [array("Q", bytes(8 * pages)) for pages in model.shape]
        self.versions[RAM][: model.populated_pages] = array("Q", [1]) * model.populated_pages
        self.versions[FIRMWARE][:] = array("Q", [1]) * model.firmware_pages
        self.written: list[set[int]] = [set(), set()]
        # A generator each: how one kind of access is drawn does not depend on the others.
        self._write_draws = random.Random(f"{seed} writes")
        self._read_draws = random.Random(f"{seed} reads")
        self._firmware_draws = random.Random(f"{seed} firmware")
        self._ran_s = 0.0
        self._writes = self._reads = self._firmware_writes = 0

    def run(self, seconds: float) -> None:
        """Lets that much time pass for it: its writes take place, its reads leave no trace."""
        self._ran_s += seconds
        pattern = self.model.pattern
        due = int(pattern.writes_per_s * self._ran_s)
        self._write_many(due - self._writes)
        self._writes = due
        due = int(pattern.firmware_writes_per_s * self._ran_s)
        for _ in range(min(due - self._firmware_writes, SATURATION * self.model.firmware_pages)):
            self.write(FIRMWARE, int(self._firmware_draws.random() * self.model.firmware_pages))
        self._firmware_writes = due
        self._reads = int(pattern.reads_per_s * self._ran_s)

    def next_accesses(self, seconds: float) -> list[int]:
        """Lets time pass at the destination and returns the pages of RAM accessed in it, in order.

        Each may have to wait for its page. Its writes make no versions: the move compares the
        destination with the source's last ones.
        """
        self._ran_s += seconds
        pattern = self.model.pattern
        writes = int(pattern.writes_per_s * self._ran_s) - self._writes
        reads = int(pattern.reads_per_s * self._ran_s) - self._reads
        self._writes += writes
        self._reads += reads
        accesses = [self._draw(self._read_draws) for _ in range(reads)]
        accesses += [self._draw(self._write_draws) for _ in range(writes)]
        self._read_draws.shuffle(accesses)
        return accesses

    def write(self, block: int, page: int) -> None:
        """A write to a page, wherever it comes from."""
        self.versions[block][page] += 1
        self.written[block].add(page)

    def take_written(self) -> list[list[tuple[int, int]]]:
        """Runs [start, stop) of written pages a block, ascending; none is written then."""
        taken = [runs(pages) for pages in self.written]
        self.written = [set(), set()]
        return taken

    def _draw(self, draws: random.Random) -> int:
        pattern = self.model.pattern
        hot = pattern.hot_share > 0 and draws.random() < pattern.hot_share
        return int(draws.random() * (pattern.hot_pages if hot else pattern.working_set_pages))

    def _write_many(self, count: int) -> None:
        pattern = self.model.pattern
        rarest = pattern.working_set_pages / max(1e-9, 1.0 - pattern.hot_share)
        if count > SATURATION * rarest:
            for page in range(pattern.working_set_pages):
                self.write(RAM, page)
            return
        for _ in range(count):
            self.write(RAM, self._draw(self._write_draws))


def runs(pages: set[int]) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of a set of page numbers, ascending."""
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        if found and found[-1][1] == page:
            found[-1] = (found[-1][0], page + 1)
        else:
            found.append((page, page + 1))
    return found
