"""Labs for tests; skipped with the reason where the machine cannot have one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmferry.errors import FerryError
from vmferry.lab import downloads, qemus
from vmferry.lab.qemus import QemuBinary


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


@pytest.fixture(params=[10, 7], ids=lambda major: f"qemu{major}")
def binary(request: pytest.FixtureRequest, machine: None) -> QemuBinary:
    """Each QEMU that this distribution offers."""
    major: int = request.param
    for candidate in qemus.available():
        if candidate.version[0] == major:
            return candidate
    pytest.skip(f"this distribution offers no QEMU {major}")
