"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from tests.cli.host_processes import HostProcess, StartHost


@pytest.fixture
def start_host(tmp_path: Path) -> Generator[StartHost]:
    started: list[HostProcess] = []

    def start(name: str, listen: str = "127.0.0.1:0") -> HostProcess:
        host = HostProcess(tmp_path / name, name, listen)
        started.append(host)
        return host

    yield start
    for host in started:
        if host.process.poll() is None:
            host.process.kill()
        host.process.wait()
