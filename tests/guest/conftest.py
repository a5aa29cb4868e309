"""Each test that asks for a bench runs on every version of QEMU on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.lab import qemus

from .bench import Bench
from .firmware_guests import Guests

VERSIONS = ["10.0", "7.2"]


@pytest.fixture(params=VERSIONS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    wanted = tuple(int(n) for n in str(request.param).split("."))
    binary = next((b for b in qemus.available() if b.version[: len(wanted)] == wanted), None)
    if binary is None:
        pytest.skip(f"no QEMU {request.param} on this machine")
    # Paths of sockets are bounded, so pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="vfg-"))
    yield Bench(binary, folder)
    shutil.rmtree(folder)


@pytest.fixture
def guests(bench: Bench) -> Iterator[Guests]:
    """Starts guests that nobody has prepared, and kills them at the end."""
    started = Guests(bench.binary, bench.folder)
    yield started
    started.end()
