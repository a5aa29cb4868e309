"""One lab, one guest and one event loop for all faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator

import pytest
from tests.faults.stage import Stage
from tests.lab.conftest import machine

from vmferry.lab.lab import Lab

Play = Callable[[Callable[[Stage], Coroutine[None, None, None]]], None]


class _Theatre:
    """Keeps the stage for as long as every scene on it ends well."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._stage: Stage | None = None

    def play(self, scene: Callable[[Stage], Coroutine[None, None, None]]) -> None:
        if self._stage is None:
            self._stage = self._runner.run(self._open())
        try:
            self._runner.run(scene(self._stage))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._stage is not None:
            self._runner.run(self._stage.lab.close())
            self._stage = None

    async def _open(self) -> Stage:
        lab = await Lab().__aenter__()
        try:
            return await Stage.open(lab)
        except BaseException:
            await lab.close()
            raise


@pytest.fixture(scope="session")
def play(machine: None) -> Generator[Play]:
    """Plays a scene on the stage that all of them share; after a failed one it is a new stage."""
    with asyncio.Runner() as runner:
        theatre = _Theatre(runner)
        yield theatre.play
        theatre.close()


__all__ = ["machine"]
