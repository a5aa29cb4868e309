"""Virtual time for asyncio: nobody waits, and a wait that nothing can end is an error."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable

from vmferry.errors import FerryError


class VirtualDeadlock(FerryError):
    """Everything waits and no timer is set: the simulated move would never end."""


class _Selector(selectors.SelectSelector):
    """Lets the time that the loop would sleep pass at once."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise VirtualDeadlock("deadlock in virtual time: every task waits, and for no timer")
        self._advance(timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 and moves only when all tasks wait.

    Give it to `asyncio.Runner(loop_factory=VirtualLoop)`. It knows no threads: a result that comes
    from another thread comes too late.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Selector(self._pass))
        # Timers that differ by rounding alone are due together.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds
