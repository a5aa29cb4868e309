"""Hands the page streams that arrive to the move they belong to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmferry._core import Stream

TOKEN_BYTES = 16


@dataclass
class _Expected:
    bulk_count: int
    complete: asyncio.Future[tuple[list[Stream], Stream]]
    bulk: list[Stream] = field(default_factory=list)
    urgent: Stream | None = None

    def has_enough(self, urgent: bool) -> bool:
        return self.urgent is not None if urgent else len(self.bulk) == self.bulk_count

    def close_all(self) -> None:
        for stream in self.bulk:
            stream.close()
        if self.urgent is not None:
            self.urgent.close()


class StreamDesk:
    """Streams named by tokens that somebody expects are kept until their set is whole; every
    other is closed. Used from the event loop alone."""

    def __init__(self) -> None:
        self._expected: dict[bytes, _Expected] = {}

    def expects_any(self) -> bool:
        """Whether a page stream that arrives now may be of use."""
        return bool(self._expected)

    def expect(self, token: bytes, bulk: int) -> asyncio.Future[tuple[list[Stream], Stream]]:
        """Lets streams of `token` in from now on; the future gives `bulk` of them and the urgent
        one. Cancelling it (so a time-out around it, too) closes what came."""
        if len(token) != TOKEN_BYTES or token in self._expected:
            raise ValueError("a token is 16 bytes and expected once")
        future: asyncio.Future[tuple[list[Stream], Stream]] = (
            asyncio.get_running_loop().create_future()
        )
        self._expected[token] = _Expected(bulk, future)
        future.add_done_callback(lambda _: self._forget(token))
        return future

    def deliver(self, token: bytes, urgent: bool, stream: Stream) -> bool:
        """Takes a stream over; False (and closed) when nobody waits for it."""
        expected = self._expected.get(token)
        if expected is None or expected.complete.cancelled() or expected.has_enough(urgent):
            stream.close()
            return False
        if urgent:
            expected.urgent = stream
        else:
            expected.bulk.append(stream)
        if expected.urgent is not None and expected.has_enough(urgent=False):
            del self._expected[token]
            expected.complete.set_result((expected.bulk, expected.urgent))
        return True

    def _forget(self, token: bytes) -> None:
        expected = self._expected.pop(token, None)
        if expected is not None:
            expected.close_all()
