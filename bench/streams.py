"""What the page streams reach between two processes of this machine, over loopback TLS.

    python bench/streams.py [MIB]

Prints a table; every figure is the median of several runs with the lowest and the highest.
Source, destination, both engines and whatever else runs share the processors.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.core.stream_ends import Child, Way, pages_of

from vmferry import _core as core


def seconds(work: Callable[[], object], runs: int) -> list[float]:
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return sorted(found)


def row(name: str, unit: str, values: list[float]) -> None:
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"{name:<52} {middle:9.2f} {unit:<5} ({low:.2f} to {high:.2f})")


def pushes(pages: int, streams: int) -> None:
    size = pages * 4096
    source = Child(pages)
    for like in ("random", "text"):
        source.tell("fill", seed=1, like=like)
        destination = Child(pages)
        way = Way(source.memory, destination.memory, streams=streams)
        everything = source.all_pages()
        name = f"push, {size >> 20} MiB of {like}, {streams} streams"
        fresh = seconds(lambda: way.sender.push(everything), 1)  # noqa: B023
        row(f"{name}, fresh memory", "GB/s", [size / s / 1e9 for s in fresh])
        again = seconds(lambda: way.sender.push(everything), 7)  # noqa: B023
        row(f"{name}, populated", "GB/s", [size / s / 1e9 for s in again])
        for count in (1, 64, 1000):
            some = pages_of(source.memory, random.Random(1).sample(range(pages), count))
            took = seconds(lambda: way.sender.push(some), 30)  # noqa: B023
            row(f"push, {count} scattered pages of {like}", "ms", [s * 1e3 for s in took])
        way.finish()
        destination.kill()
    source.kill()


def faults(pages: int, threads: int, pull: bool) -> None:
    source, destination = Child(pages), Child(pages)
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    descriptor, _ = core.inject_userfaultfd(destination.pid, user_mode_only=False, keep_open=True)
    way.receiver.serve_faults(descriptor, [0], False)
    way.sender.serve(source.all_pages())
    began = time.perf_counter()
    destination.begin("touch", seed=2, threads=threads)
    if pull:
        way.sender.pull()
        took = time.perf_counter() - began
    destination.answer()
    stats = way.receiver.fault_stats()
    kind = "with pull" if pull else "no pull"
    name = f"fault round trip, {threads} threads, {kind}, p50"
    row(name, "us", [stats.latency_us_p50])
    row(f"{'':>10} p99, {stats.network_faults} faults", "us", [stats.latency_us_p99])
    if pull:
        row(f"{'':>10} pull of {pages * 4096 >> 20} MiB", "s", [took])
    source.kill()
    destination.kill()


def main() -> None:
    pages = int(sys.argv[1] if len(sys.argv) > 1 else 512) * 256
    for streams in (1, 2):
        pushes(pages, streams)
    faults(8192, 1, pull=False)
    faults(8192, 4, pull=False)
    faults(65536, 2, pull=True)


if __name__ == "__main__":
    main()
