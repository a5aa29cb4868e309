"""What the lab downloads and builds, kept between runs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """VMFERRY_CACHE, or `.cache` at the root of the source tree; it is made if it is not there."""
    root = os.environ.get("VMFERRY_CACHE")
    directory = Path(root) if root else Path(__file__).parents[3] / ".cache"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def cache_lock() -> Generator[None]:
    """One process at a time fills the cache; the others wait and find it full."""
    with (cache_dir() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
