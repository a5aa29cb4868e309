"""Real processes whose memory the tests track, read, trap and keep."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmferry import _core as core

CHILD = Path(__file__).with_name("child.py")


class Child:
    """A running `child.py` and its one block of memory."""

    def __init__(self, kind: str, pages: int, path: Path) -> None:
        self.pages = pages
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), kind, str(pages), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        answer = self.answer()
        assert isinstance(answer, dict)
        shared = kind in {"memfd", "file", "huge"}
        page_size = 2 << 20 if kind.startswith("huge") else 4096
        self.block = core.Block("ram", answer["address"], pages * 4096, page_size, shared)
        self.memory = core.Memory(self.pid, [self.block])

    def begin(self, do: str, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def answer(self) -> object:
        return json.loads(self.line())

    def tell(self, do: str, **order: object) -> object:
        self.begin(do, **order)
        return self.answer()

    def track(self) -> core.Tracker:
        descriptor, _ = core.inject_userfaultfd(self.pid, user_mode_only=True, keep_open=False)
        return core.Tracker(self.memory, descriptor)

    def maps(self) -> list[str]:
        """Addresses and permissions of its mappings, but for the growing ones."""
        lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return [line for line in lines if "[heap]" not in line and "[stack]" not in line]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    children: list[Child] = []

    def start(kind: str = "private", pages: int = 1024) -> Child:
        children.append(Child(kind, pages, tmp_path / "ram"))
        return children[-1]

    yield start
    for child in children:
        child.kill()


@pytest.fixture
def child(start: Start) -> Child:
    return start()


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """At least 16 free huge pages of 2 MiB, given back afterwards."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = pool.read_text()
    pool.write_text(str(int(before) + 16))
    yield
    pool.write_text(before)
