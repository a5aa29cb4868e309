"""Fixtures of the daemon's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.host.daemons_in_process import Hosts


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path)
