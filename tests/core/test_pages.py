"""Page sets, memory and dirty tracking on real processes of every kind of memory."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tests.core.conftest import Child, Start

from vmferry import _core as core

KINDS = ["private", "private-huge", "memfd", "memfd-private", "file", "file-private"]


def pages_of(pages: core.PageSet) -> set[int]:
    return {page for start, stop in pages.ranges(0) for page in range(start, stop)}


def words(digests: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(digests) // 8}Q", digests)


# --- page sets ---------------------------------------------------------------------------------


def test_page_set_is_a_set() -> None:
    pages = core.PageSet([100, 7])
    pages.add(0, 3, 70)
    pages.add(1, 6, 7)
    pages.discard(0, 10, 12)
    assert pages.ranges(0) == [(3, 10), (12, 70)]
    assert (len(pages), pages.count(0), pages.count(1)) == (66, 65, 1)
    assert pages.contains(1, 6)
    assert not pages.contains(0, 10)
    other = core.PageSet([100, 7])
    other.add(0, 60, 100)
    assert (pages | other).ranges(0) == [(3, 10), (12, 100)]
    assert (pages & other).ranges(0) == [(60, 70)]
    assert (pages - other).ranges(0) == [(3, 10), (12, 60)]
    assert pages & other == other & pages
    assert not core.PageSet([100, 7])
    assert pages.ranges(0) == [(3, 10), (12, 70)], "operators change no operand"


def test_page_set_refuses_what_does_not_fit() -> None:
    pages = core.PageSet([100, 7])
    with pytest.raises(ValueError, match="does not fit"):
        pages | core.PageSet([100, 8])
    for block, start, stop in [(0, 0, 101), (2, 0, 1), (0, 5, 4)]:
        with pytest.raises(ValueError, match="block"):
            pages.add(block, start, stop)
    with pytest.raises(ValueError, match="block 2"):
        pages.count(2)
    assert not pages.contains(9, 9)


# --- reading and writing -----------------------------------------------------------------------


def test_memory_reads_and_writes(child: Child) -> None:
    child.tell("fill", pages=[5, 6])
    assert child.memory.read(0, 5 * 4096, 8192) == (
        struct.pack("Q", 6) * 512 + struct.pack("Q", 7) * 512
    )
    child.memory.write(0, 6 * 4096, b"\x42")
    assert child.tell("look", pages=[6]) == [0x42]
    with pytest.raises(ValueError, match="inside"):
        child.memory.read(0, child.block.length - 1, 2)
    with pytest.raises(ValueError, match="inside"):
        child.memory.write(0, child.block.length - 1, b"ab")


@pytest.mark.parametrize(
    ("address", "length", "page_size"),
    [(1, 4096, 4096), (4096, 4095, 4096), (4096, 0, 4096), (4096, 4096, 2 << 20), (0, 4096, 3)],
)
def test_blocks_that_make_no_sense_are_refused(address: int, length: int, page_size: int) -> None:
    with pytest.raises(ValueError, match='RAM block "odd"'):
        core.Memory(1, [core.Block("odd", address, length, page_size)])


def test_overlapping_blocks_are_refused() -> None:
    blocks = [core.Block("low", 4096, 8192), core.Block("high", 8192, 4096)]
    with pytest.raises(ValueError, match="overlap"):
        core.Memory(1, blocks)


def test_a_process_that_ended_is_an_error_everywhere(child: Child) -> None:
    tracker = child.track()
    tracker.scan()
    child.kill()
    for attempt in (
        tracker.scan,
        child.memory.populated,
        child.memory.digests,
        lambda: child.memory.read(0, 0, 8),
        lambda: child.memory.write(0, 0, b"x"),
    ):
        with pytest.raises(core.CoreError, match=f"process {child.pid} is gone"):
            attempt()
    tracker.close()


def test_memory_that_is_not_mapped_is_an_error(child: Child) -> None:
    memory = core.Memory(child.pid, [core.Block("nowhere", 1 << 40, 4096)])
    with pytest.raises(core.CoreError, match="process_vm_readv"):
        memory.read(0, 0, 8)


# --- what is populated -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_populated_pages_and_their_digests(start: Start, kind: str) -> None:
    child = start(kind, 64 if "huge" in kind else 2000)
    written = [0, 1, 17, 63]
    child.tell("fill", pages=written)
    child.tell("write", pages=[5], value=0)
    populated = child.memory.populated()
    if kind != "private-huge":
        assert pages_of(populated) == {*written, 5}
    digests = words(child.memory.digests())
    assert {page for page, digest in enumerate(digests) if digest} == set(written)
    assert len({digests[page] for page in written}) == len(written)
    assert child.memory.populated() == populated, "digesting populates nothing"


def test_a_private_mapping_shows_what_its_file_holds(start: Start, tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(b"\x01" * 4096 * 3 + bytes(4096 * 5))
    child = start("file-private", 512)
    assert {0, 1, 2} <= pages_of(child.memory.populated())
    assert {0, 1, 2} <= pages_of(child.track().scan())
    assert [bool(digest) for digest in words(child.memory.digests())[:4]] == [1, 1, 1, 0]


def test_pages_given_back_are_populated_no_more(child: Child) -> None:
    child.tell("fill", pages=list(range(100)))
    child.tell("discard", page=10, count=20)
    core.inject_discard(child.pid, child.block.address + 50 * 4096, 10 * 4096)
    assert child.memory.populated().ranges(0) == [(0, 10), (30, 50), (60, 100)]
    assert child.tell("look", pages=[9, 10, 50, 60]) == [10, 0, 0, 61]


def test_differing_pages_are_named_and_counted() -> None:
    a = struct.pack("<200Q", *range(200))
    b = struct.pack("<200Q", *(n + (n % 2) for n in range(200)))
    assert core.differing_pages(a, b) == list(range(1, 129, 2))
    assert core.count_differing(a, b) == 100
    assert core.differing_pages(a, a) == []
    with pytest.raises(ValueError, match="do not compare"):
        core.count_differing(a, b[:-8])


@pytest.mark.parametrize("kind", ["huge", "huge-private"])
def test_huge_pages_are_tracked_whole(start: Start, huge_pages: None, kind: str) -> None:
    child = start(kind, 8 * 512)
    child.tell("fill", pages=[3, 512 * 5 + 7])
    tracker = child.track()
    assert tracker.scan().ranges(0) == [(0, 512), (2560, 3072)]
    assert not tracker.scan()
    child.tell("write", pages=[2561, 4095], value=1)
    assert tracker.scan().ranges(0) == [(2560, 3072), (3584, 4096)]
    assert child.memory.populated().ranges(0) == [(0, 512), (2560, 3072), (3584, 4096)]
    digests = words(child.memory.digests())
    assert [page for page, digest in enumerate(digests) if digest] == [3, 2561, 2567, 4095]
    tracker.close()


# --- tracking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scans_report_exactly_what_was_written(start: Start, kind: str) -> None:
    child = start(kind, 3000)
    first = [*range(0, 600, 2), 2999]
    child.tell("fill", pages=first)
    tracker = child.track()
    found = pages_of(tracker.scan())
    if kind == "private-huge":
        assert found >= set(first)
    else:
        assert found == set(first)
    assert pages_of(tracker.scan()) == set()
    # More runs than the kernel returns in a call, armed pages and untouched ones.
    written = [*range(1, 2600, 2), *range(4, 40, 4)]
    child.tell("write", pages=written, value=7)
    assert pages_of(tracker.scan()) >= set(written)
    child.tell("write", pages=[2, 3, 2999], value=8)
    assert pages_of(tracker.scan()) == {2, 3, 2999}
    assert pages_of(tracker.scan()) == set()
    tracker.close()


@pytest.mark.parametrize("kind", KINDS)
def test_writes_by_the_kernel_and_from_outside_count(start: Start, kind: str) -> None:
    child = start(kind)
    child.tell("fill", pages=list(range(20)))
    tracker = child.track()
    tracker.scan()
    child.tell("read_into", pages=[3, 900])
    assert pages_of(tracker.scan()) >= {3, 900}
    child.memory.write(0, 4 * 4096, b"x")
    assert pages_of(tracker.scan()) == {4}


@pytest.mark.parametrize("kind", ["private", "memfd", "memfd-private", "file"])
def test_eviction_between_scans_loses_no_page(start: Start, kind: str) -> None:
    child = start(kind, 2048)
    child.tell("fill", pages=list(range(512)))
    tracker = child.track()
    assert pages_of(tracker.scan()) == set(range(512))
    written = set(range(100, 400, 3)) | {1000, 1500}
    child.tell("write", pages=sorted(written), value=9)
    child.tell("evict")
    assert written <= pages_of(tracker.scan())
    child.tell("evict")
    assert pages_of(tracker.scan()) == set()
    assert pages_of(child.memory.populated()) == set(range(512)) | {1000, 1500}
    digests = words(child.memory.digests())
    assert {page for page, digest in enumerate(digests) if digest} == set(range(512)) | {1000, 1500}


def test_holes_punched_into_shared_memory_are_not_reported(start: Start) -> None:
    child = start("memfd")
    child.tell("fill", pages=list(range(100)))
    tracker = child.track()
    tracker.scan()
    child.tell("write", pages=[8, 12], value=3)
    child.tell("punch", page=10, count=30)
    assert pages_of(tracker.scan()) == {8}
    assert child.memory.populated().ranges(0) == [(0, 10), (40, 100)]


def test_closing_a_tracker_leaves_nothing_behind(child: Child) -> None:
    child.tell("fill", pages=[1, 2, 3])
    tracker = child.track()
    assert tracker.scan()
    smaps = Path(f"/proc/{child.pid}/smaps")
    assert " uw " in smaps.read_text()
    tracker.close()
    tracker.close()
    assert " uw " not in smaps.read_text()
    assert core.find_userfaultfd(child.pid) == []
    with pytest.raises(ValueError, match="closed"):
        tracker.scan()


def test_a_tracker_that_is_dropped_leaves_nothing_behind(child: Child) -> None:
    descriptor, _ = core.inject_userfaultfd(child.pid, user_mode_only=True, keep_open=True)
    tracker = core.Tracker(child.memory, descriptor)
    smaps = Path(f"/proc/{child.pid}/smaps")
    assert " uw " in smaps.read_text()
    del tracker
    assert " uw " not in smaps.read_text()


def test_a_tracker_that_cannot_register_leaves_nothing_behind(child: Child) -> None:
    memory = core.Memory(child.pid, [child.block, core.Block("nowhere", 1 << 40, 4096)])
    descriptor, _ = core.inject_userfaultfd(child.pid, user_mode_only=True, keep_open=True)
    with pytest.raises(core.CoreError, match="UFFDIO_REGISTER"):
        core.Tracker(memory, descriptor)
    assert " uw " not in Path(f"/proc/{child.pid}/smaps").read_text()
