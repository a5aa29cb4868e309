"""Undo work is done whatever cancels the one who waits for it."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.engine.surely import surely


@pytest.mark.parametrize("cancellations", [0, 1, 2, 5])
def test_it_ends_under_any_number_of_cancellations(cancellations: int) -> None:
    async def scenario() -> None:
        done: list[str] = []
        may_end = asyncio.Event()

        async def undo() -> str:
            await may_end.wait()
            done.append("undone")
            return "result"

        task = asyncio.create_task(surely(undo()))
        for _ in range(cancellations):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        if cancellations:
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            assert await task == "result"
        assert done == ["undone"]

    asyncio.run(scenario())


def test_a_failure_of_the_work_is_told_even_when_cancelled() -> None:
    async def scenario() -> None:
        async def undo() -> None:
            await asyncio.sleep(0)
            raise ValueError("it could not be undone")

        task = asyncio.create_task(surely(undo()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(ValueError, match="could not be undone"):
            await task

    asyncio.run(scenario())
