"""Work that no cancellation cuts short: resume, abort, commit."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")


async def surely(work: Coroutine[object, object, T]) -> T:
    """Runs `work` to its end, however often the caller is cancelled meanwhile.

    A plain `finally: await resume()` does not survive a second cancellation (two Ctrl-C). Here
    the work is a task of its own; a cancellation of the caller is kept until the work is done and
    raised then. If the work itself fails, its error is raised instead. The work bears its own
    time limits: nothing else ends it.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    result = task.result()
    if cancellation is not None:
        raise cancellation
    return result
