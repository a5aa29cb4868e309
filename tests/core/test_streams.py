"""Page streams between the memories of two real processes, over real sockets."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from stream_ends import (
    DESTINATION,
    SOURCE,
    TOKEN,
    Child,
    Way,
    in_background,
    make_host,
    pages_of,
    stream_pair,
    tcp_pair,
)

from vmferry import _core as core

PAGES = 4096
StartChild = Callable[..., Child]


@pytest.fixture
def start_child() -> Iterator[StartChild]:
    children: list[Child] = []

    def start(pages: int = PAGES, kind: str = "private") -> Child:
        children.append(Child(pages, kind))
        return children[-1]

    yield start
    for child in children:
        child.kill()


@pytest.fixture(params=["private", "memfd"])
def pair(request: pytest.FixtureRequest, start_child: StartChild) -> tuple[Child, Child]:
    return start_child(kind=request.param), start_child(kind=request.param)


def assert_equal(source: Child, destination: Child) -> None:
    here, there = source.memory.digests(), destination.memory.digests()
    assert core.differing_pages(here, there) == []


def trap(destination: Child, way: Way, *, record: bool = False) -> None:
    descriptor, _ = core.inject_userfaultfd(destination.pid, user_mode_only=False, keep_open=True)
    way.receiver.serve_faults(descriptor, [0], record)


class Meddler:
    """Stands between the two ends of each stream; what it does to the bytes is set at any time."""

    def __init__(self) -> None:
        self.flip = threading.Event()
        self.cut = threading.Event()
        self.silent = threading.Event()
        self.passed = 0
        self.sockets: list[socket.socket] = []

    def __call__(self, near: socket.socket, far: socket.socket) -> None:
        self.sockets += [near, far]
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                self.passed += len(data)
                if self.silent.is_set():
                    threading.Event().wait()
                if self.cut.is_set():
                    break
                if self.flip.is_set() and len(data) > 1000:
                    data[len(data) // 2] ^= 4
                    self.flip.clear()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


# --- push ----------------------------------------------------------------------------------------


def test_memory_is_equal_after_rounds_with_a_writer(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.tell("fill", seed=1)
    descriptor, _ = core.inject_userfaultfd(source.pid, user_mode_only=True, keep_open=False)
    tracker = core.Tracker(source.memory, descriptor)
    way = Way(source.memory, destination.memory)
    source.tell("start_writer", seed=2)
    for _ in range(4):
        way.sender.push(tracker.scan())
    source.tell("stop_writer")
    last = tracker.scan()
    assert len(last) > 0
    way.sender.push(last)
    tracker.close()
    assert_equal(source, destination)
    progress = way.sender.progress()
    assert progress.pages > PAGES
    assert progress.remaining == 0
    assert progress.payload_bytes == progress.pages * 4096
    assert way.receiver.pages_installed == progress.pages
    way.finish()


@pytest.mark.parametrize("count", [1, 64, 256, 257, 1000])
def test_scattered_pages_and_nothing_else(start_child: StartChild, count: int) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory, streams=3)
    pages = random.Random(count).sample(range(PAGES), count)
    way.sender.push(pages_of(source.memory, pages))
    here, there = source.memory.digests(), destination.memory.digests()
    for page in range(PAGES):
        digest = there[page * 8 : page * 8 + 8]
        expected = here[page * 8 : page * 8 + 8] if page in pages else bytes(8)
        assert digest == expected, page
    way.finish()


def test_zero_pages_travel_as_runs_and_touch_nothing_fresh(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.tell("fill", seed=1)
    source.tell("zero", pages=list(range(1000, 2000)))
    way = Way(source.memory, destination.memory)
    way.sender.push(source.all_pages())
    assert_equal(source, destination)
    assert not destination.memory.populated() & pages_of(destination.memory, range(1000, 2000))
    progress = way.sender.progress()
    assert progress.zero_pages == 1000
    assert 0 < progress.by_encoding["zero"] < 4096

    source.tell("zero", pages=list(range(3000, 3100)))
    way.sender.push(pages_of(source.memory, range(3000, 3100)))
    assert_equal(source, destination)
    way.finish()


def test_discarded_pages_read_as_zeros(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    way.sender.push(source.all_pages())
    source.tell("zero", pages=list(range(100, 900)))
    way.sender.discard(pages_of(source.memory, range(100, 900)))
    assert_equal(source, destination)
    way.finish()


def test_what_was_at_the_destination_before_is_overwritten_with_zeros(
    start_child: StartChild,
) -> None:
    source, destination = start_child(), start_child()
    destination.tell("fill", seed=7)
    way = Way(source.memory, destination.memory)
    way.sender.push(source.all_pages())
    assert_equal(source, destination)
    way.finish()


def test_a_slow_link_is_given_compressed_pages(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1, like="text")
    way = Way(source.memory, destination.memory)
    way.sender.set_rate(10_000_000)
    way.sender.push(source.all_pages())
    assert_equal(source, destination)
    progress = way.sender.progress()
    assert progress.by_encoding["zstd"] > 0
    assert progress.wire_bytes < progress.payload_bytes / 2
    assert sum(progress.by_encoding.values()) <= progress.wire_bytes
    way.finish()


def test_random_content_goes_raw(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    way.sender.push(source.all_pages())
    encodings = way.sender.progress().by_encoding
    assert encodings["lz4"] == encodings["zstd"] == 0
    assert encodings["raw"] > PAGES * 4096
    way.finish()


# --- post-copy -----------------------------------------------------------------------------------


def test_threads_that_touch_pages_while_they_are_pulled(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.tell("fill", seed=1)
    source.tell("zero", pages=list(range(64, PAGES, 7)))
    way = Way(source.memory, destination.memory)
    trap(destination, way, record=True)
    missing = source.all_pages()
    way.sender.serve(missing)
    assert way.receiver.missing == PAGES
    with pytest.raises(core.CoreError, match="missing still"):
        way.receiver.release()
    destination.begin("touch", seed=2, threads=4)
    way.sender.set_rate(200_000_000)
    way.sender.pull()
    assert way.receiver.missing == 0
    assert destination.answer() == source.tell("digest")
    digests = way.receiver.installed_digests()
    assert core.differing_pages(source.memory.digests(), digests) == []
    stats = way.receiver.fault_stats()
    assert stats.network_faults + stats.served_under_way > 0
    assert 0 < stats.latency_us_p50 <= stats.latency_us_p99 <= stats.latency_us_max
    assert stats.stall_ms > 0
    assert way.sender.progress().pages == PAGES
    way.finish()
    way.receiver.release()
    assert destination.tell("digest") == source.tell("digest")


def test_hybrid_pages_pushed_before_are_there_and_holes_are_zero(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    source.tell("discard", page=2000, count=500)
    way = Way(source.memory, destination.memory)
    trap(destination, way)
    way.sender.push(source.memory.populated())
    dirty = list(range(0, 2000, 3))
    source.tell("write", seed=5, pages=dirty)
    for page in dirty:
        destination.tell("discard", page=page, count=1)
    way.sender.serve(pages_of(source.memory, dirty))
    destination.begin("touch", seed=2, threads=3)
    assert destination.answer() == source.tell("digest")
    assert way.receiver.fault_stats().zero_faults > 0
    way.sender.pull()
    way.finish()
    way.receiver.release()


def test_pages_in_place_that_should_be_missing_are_an_error(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    trap(destination, way)
    way.sender.push(pages_of(source.memory, range(10, 20)))
    with pytest.raises(core.StreamClosed):
        way.sender.serve(source.all_pages())
    with pytest.raises(core.CoreError, match="10 missing pages are in place"):
        way.waited()


def test_pages_given_back_during_post_copy_read_as_zeros(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    trap(destination, way, record=True)
    way.sender.serve(source.all_pages())
    destination.begin("discard_while", seed=3, rounds=400, most=12)
    way.sender.pull()
    assert destination.answer() == []
    given = way.receiver.discarded()
    assert way.receiver.fault_stats().discarded_pages == len(given) > 0
    way.finish()
    way.receiver.release()
    here, there = source.memory.digests(), destination.memory.digests()
    for page in range(PAGES):
        expected = bytes(8) if given.contains(0, page) else here[page * 8 : page * 8 + 8]
        assert there[page * 8 : page * 8 + 8] == expected, page


def test_the_keeper_serves_on_when_the_source_is_dead(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    expected = source.tell("digest")
    keeper = core.make_keeper(source.pid)
    way = Way(source.memory, destination.memory)
    trap(destination, way)
    way.sender.serve(source.all_pages())
    way.sender.set_memory(core.Memory(keeper, source.memory.blocks))
    source.kill()
    try:
        destination.begin("touch", seed=2, threads=2)
        way.sender.pull()
        assert destination.answer() == expected
        way.finish()
        way.receiver.release()
    finally:
        subprocess.run(["kill", "-9", str(keeper)], check=True)


def test_a_requested_page_brings_its_neighbours(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    trap(destination, way)
    way.sender.serve(source.all_pages())
    destination.tell("touch", seed=2, threads=1, most=1)
    while way.receiver.missing > PAGES - 16:
        pass
    assert way.receiver.fault_stats().network_faults == 1
    assert way.sender.progress().pages == 16
    way.sender.cancel()


def test_serve_comes_before_serve_faults(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    served = in_background(lambda: way.sender.serve(source.all_pages()))
    trap(destination, way)
    served()
    destination.begin("touch", seed=2, threads=1)
    way.sender.pull()
    assert destination.answer() == source.tell("digest")
    way.finish()


# --- who may speak -------------------------------------------------------------------------------


def test_a_third_host_is_refused_on_both_sides() -> None:
    third = make_host("third")
    near, far = tcp_pair()
    accepted = in_background(lambda: core.Stream.accept(far, DESTINATION.trusts(SOURCE)))
    with pytest.raises(core.StreamClosed, match="paired"):
        core.Stream.connect(near, third.trusts(DESTINATION), TOKEN, False)
    with pytest.raises(core.StreamClosed, match="paired"):
        accepted()

    near, far = tcp_pair()
    accepted = in_background(lambda: core.Stream.accept(far, third.trusts(SOURCE)))
    with pytest.raises(core.StreamClosed, match="paired"):
        core.Stream.connect(near, SOURCE.trusts(DESTINATION), TOKEN, False)
    with pytest.raises(core.StreamClosed):
        accepted()


def test_the_token_says_which_move_and_a_refused_one_breaks_the_first_push(
    start_child: StartChild,
) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        core.Stream.connect(tcp_pair()[0], SOURCE.trusts(DESTINATION), b"short", False)
    source = start_child()
    source.tell("fill", seed=1)
    near, far = stream_pair()
    urgent, _ = stream_pair(urgent=True)
    far.close()
    sender = core.Sender(source.memory, [near], urgent)
    with pytest.raises(core.StreamClosed):
        sender.push(source.all_pages())
    with pytest.raises(ValueError, match="in use or closed"):
        core.Sender(source.memory, [near], urgent)


@pytest.mark.parametrize("garbage", [b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff"])
def test_garbage_is_refused(garbage: bytes) -> None:
    near, far = tcp_pair()
    accepted = in_background(lambda: core.Stream.accept(far, DESTINATION.trusts(SOURCE)))
    with socket.socket(fileno=near) as client:
        client.sendall(garbage)
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(core.StreamClosed):
            accepted()


def test_credentials_that_do_not_parse() -> None:
    for bad in (b"", b"no pem", SOURCE.key):
        with pytest.raises(ValueError, match="certificate"):
            core.Credentials(bad, SOURCE.key, [DESTINATION.certificate])
    with pytest.raises(ValueError, match="key"):
        core.Credentials(SOURCE.certificate, b"", [DESTINATION.certificate])
    with pytest.raises(ValueError, match="certificate"):
        core.Credentials(SOURCE.certificate, DESTINATION.key, [DESTINATION.certificate])


# --- what breaks ---------------------------------------------------------------------------------


def test_a_bit_changed_on_the_wire_is_noticed(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    meddler = Meddler()
    way = Way(source.memory, destination.memory, through=meddler)
    way.sender.push(pages_of(source.memory, range(100)))
    meddler.flip.set()
    with pytest.raises(core.StreamClosed):
        way.sender.push(source.all_pages())
    with pytest.raises(core.StreamClosed, match="changed on the way"):
        way.waited()


def test_a_cut_in_the_middle_of_a_push(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    meddler = Meddler()
    way = Way(source.memory, destination.memory, through=meddler)
    way.sender.set_rate(4_000_000)
    pushing = in_background(lambda: way.sender.push(source.all_pages()))
    while way.receiver.pages_installed < 200:
        pass
    meddler.cut.set()
    with pytest.raises(core.StreamClosed):
        pushing()
    with pytest.raises(core.StreamClosed):
        way.waited()
    with pytest.raises(core.StreamClosed):
        way.sender.push(source.all_pages())


def test_the_peers_engine_is_killed_in_the_middle_of_a_push(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    block = destination.memory.blocks[0]
    arguments = [str(destination.pid), str(block.address), str(block.length)]
    host = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("receiving_host.py")), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert host.stdin is not None
    assert host.stdout is not None
    order = {
        "certificate": DESTINATION.certificate.decode(),
        "key": DESTINATION.key.decode(),
        "peer": SOURCE.certificate.decode(),
        "streams": 3,
    }
    host.stdin.write(json.dumps(order) + "\n")
    host.stdin.flush()
    address = ("127.0.0.1", int(host.stdout.readline()))
    credentials = SOURCE.trusts(DESTINATION)
    streams = [
        core.Stream.connect(socket.create_connection(address).detach(), credentials, TOKEN, urgent)
        for urgent in (False, False, True)
    ]
    assert host.stdout.readline() == "receiving\n"
    sender = core.Sender(source.memory, streams[:2], streams[2])
    sender.set_rate(4_000_000)
    pushing = in_background(lambda: sender.push(source.all_pages()))
    while sender.progress().pages < 200:
        pass
    host.kill()
    with pytest.raises(core.StreamClosed):
        pushing()
    host.communicate()


def test_the_destinations_process_dies(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    destination.kill()
    with pytest.raises(core.StreamClosed):
        way.sender.push(source.all_pages())
    with pytest.raises(core.CoreError, match="gone"):
        way.waited()


def test_the_sources_process_dies(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    source.kill()
    with pytest.raises(core.CoreError, match="gone"):
        way.sender.push(source.all_pages())
    with pytest.raises(core.StreamClosed):
        way.waited()


def test_cancel_in_the_middle_of_a_push(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    way.sender.set_rate(1_000_000)
    pushing = in_background(lambda: way.sender.push(source.all_pages()))
    while way.sender.progress().pages == 0:
        pass
    way.sender.cancel()
    with pytest.raises(core.Cancelled):
        pushing()
    with pytest.raises(core.Cancelled):
        way.sender.push(source.all_pages())
    with pytest.raises(core.StreamClosed):
        way.waited()


def test_cancel_at_the_destination_unblocks_wait(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    way = Way(source.memory, destination.memory)
    way.receiver.cancel()
    with pytest.raises(core.Cancelled):
        way.waited()
    source.tell("fill", seed=1)
    with pytest.raises(core.StreamClosed):
        way.sender.push(source.all_pages())


def test_cancel_in_the_middle_of_a_pull(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    way = Way(source.memory, destination.memory)
    trap(destination, way)
    way.sender.serve(source.all_pages())
    way.sender.set_rate(1_000_000)
    pulling = in_background(way.sender.pull)
    while way.sender.progress().pages == 0:
        pass
    way.sender.cancel()
    with pytest.raises(core.Cancelled):
        pulling()
    with pytest.raises(core.StreamClosed):
        way.waited()
    assert way.receiver.missing > 0


def test_a_sender_that_goes_away_without_a_word(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    way = Way(source.memory, destination.memory)
    del way.sender
    with pytest.raises(core.StreamClosed):
        way.waited()


def test_nothing_goes_out_after_the_end(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    way = Way(source.memory, destination.memory)
    way.finish()
    with pytest.raises(core.StreamClosed, match="finished"):
        way.sender.push(source.all_pages())
    with pytest.raises(ValueError, match="shape"):
        way.sender.push(core.PageSet([1]))


@pytest.mark.long
def test_a_silent_peer_is_given_up(start_child: StartChild) -> None:
    source, destination = start_child(), start_child()
    source.tell("fill", seed=1)
    meddler = Meddler()
    way = Way(source.memory, destination.memory, through=meddler)
    meddler.silent.set()
    with pytest.raises(core.StreamClosed, match="silent"):
        way.sender.push(source.all_pages())


@pytest.mark.long
def test_a_client_that_says_nothing_is_given_up() -> None:
    near, far = tcp_pair()
    with socket.socket(fileno=near), pytest.raises(core.StreamClosed, match="in time"):
        core.Stream.accept(far, DESTINATION.trusts(SOURCE))
