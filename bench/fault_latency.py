"""How long an access waits for its page over a shaped link, with the bulk push at work beside it.

    python bench/fault_latency.py [--rate 1gbit] [--mib 256] [--pause-us 200]

Two network namespaces joined by a veth pair, `tc tbf` on both ends (root). A guest process reads
its pages in a random order with a pause between any two, so that most of its accesses meet a
quiet guest and a busy link. Latencies are those of the fault service: from reading the fault to
waking who waits.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.core import stream_ends
from tests.core.stream_ends import DESTINATION, SOURCE, TOKEN, Child, in_background

from vmferry import _core as core

NAMES = (f"vfb{os.getpid()}a", f"vfb{os.getpid()}b")
ADDRESSES = ("10.66.0.1", "10.66.0.2")
CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def link(rate: str) -> Generator[None]:
    here, there = NAMES
    try:
        for name in NAMES:
            run(f"ip netns add {name}")
        run(f"ip link add v0 netns {here} type veth peer name v0 netns {there}")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            run(f"ip -n {name} addr add {address}/24 dev v0")
            run(f"ip -n {name} link set v0 up")
            if rate != "none":
                shape = f"tbf rate {rate} burst 64kb latency 50ms"
                run(f"tc -n {name} qdisc add dev v0 root {shape}")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


@contextmanager
def inside(name: str) -> Generator[None]:
    with Path("/proc/self/ns/net").open() as before, Path(f"/run/netns/{name}").open() as space:
        if libc.setns(space.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            libc.setns(before.fileno(), CLONE_NEWNET)


def stream_pair(urgent: bool) -> tuple[core.Stream, core.Stream]:
    with inside(NAMES[1]):
        server = socket.create_server((ADDRESSES[1], 0))
    with inside(NAMES[0]):
        client = socket.create_connection(server.getsockname())
    far, _ = server.accept()
    server.close()
    accepted = in_background(lambda: core.Stream.accept(far.detach(), DESTINATION.trusts(SOURCE)))
    near = core.Stream.connect(client.detach(), SOURCE.trusts(DESTINATION), TOKEN, urgent)
    return near, accepted()[2]


def measure(pages: int, pause_us: int, like: str, *, pull: bool, warm: bool) -> None:
    source, destination = Child(pages), Child(pages)
    source.tell("fill", seed=1, like=like)
    bulk = [stream_pair(False) for _ in range(2)]
    urgent = stream_pair(True)
    sender = core.Sender(source.memory, [near for near, _ in bulk], urgent[0])
    receiver = core.Receiver(destination.memory, [far for _, far in bulk], urgent[1])
    if warm:
        part = stream_ends.pages_of(source.memory, range(pages // 8))
        sender.push(part)
        missing = source.all_pages() - part
    else:
        missing = source.all_pages()
    descriptor, _ = core.inject_userfaultfd(destination.pid, user_mode_only=False, keep_open=True)
    receiver.serve_faults(descriptor, [0], False)
    sender.serve(missing)
    began = time.perf_counter()
    count = pages if pull else 400
    destination.begin("touch", seed=2, threads=1, pause=pause_us / 1e6, most=count)
    took = 0.0
    if pull:
        sender.pull()
        took = time.perf_counter() - began
    destination.answer()
    stats = receiver.fault_stats()
    latency = (stats.latency_us_p50, stats.latency_us_p99, stats.latency_us_max)
    percentiles = " ".join(f"{us:7.0f}" for us in latency)
    kind = f"{like}, {'pull' if pull else 'no pull'}"
    progress = sender.progress()
    print(
        f"{kind:<16} {percentiles} {stats.network_faults:6} "
        f"{stats.served_under_way:6} {stats.stall_ms:8.0f} {took:7.2f} "
        f"{progress.wire_bytes / 1e6:8.0f}"
    )
    source.kill()
    destination.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--pause-us", type=int, default=200)
    options = parser.parse_args()
    print("                  p50 us    p99     max  asked on way  stall ms  pull s  wire MB")
    with link(options.rate):
        for like in ("random", "text"):
            for pull in (False, True):
                measure(options.mib * 256, options.pause_us, like, pull=pull, warm=True)


if __name__ == "__main__":
    main()
