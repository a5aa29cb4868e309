"""One lab, one guest and one event loop for all faults."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path

import pytest
from tests.faults.stage import Stage

from vmferry.errors import FerryError
from vmferry.lab import downloads
from vmferry.lab.lab import Lab

Play = Callable[[Callable[[Stage], Coroutine[None, None, None]]], None]


@pytest.fixture(scope="session")
def machine() -> None:
    """Everything that a lab needs is there (downloaded now, if need be)."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a lab makes network namespaces, bridges and taps")
    if not Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    try:
        downloads.fetch()
    except FerryError as error:
        pytest.skip(f"the lab's downloads failed: {error}")


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
