"""Whole-memory comparison (`--verify`): the digests of every page of both sides.

Pre-copy compares both memories at the switch-over, with the guest stopped. Post-copy compares each
page as it was installed with the source's frozen memory in the keeper; pages that the guest gave
back (balloon) while they were missing are left out.
"""

from __future__ import annotations

from vmferry import _core
from vmferry._core import Memory
from vmferry.errors import PeerError
from vmferry.report.records import Verification
from vmferry.wire.messages import Digests

DIGEST_BYTES = 8


def compare(memory: Memory, ours: bytes, theirs: Digests, seconds: float) -> Verification:
    """Counts the pages that differ; PeerError when the vectors do not have the same shape."""
    if len(ours) != len(theirs.data):
        raise PeerError("the destination's memory has another size than the source's")
    left, right = bytearray(ours), bytearray(theirs.data)
    starts = [0]
    for pages in memory.shape:
        starts.append(starts[-1] + pages)
    for block, start, stop in theirs.discarded:
        blank = bytes((stop - start) * DIGEST_BYTES)
        at = (starts[block] + start) * DIGEST_BYTES
        left[at : at + len(blank)] = blank
        right[at : at + len(blank)] = blank
    differing = _core.count_differing(bytes(left), bytes(right))
    return Verification(len(ours) // DIGEST_BYTES, differing, seconds)
