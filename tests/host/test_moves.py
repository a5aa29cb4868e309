"""The registry of running moves: one a guest, undone before the daemon ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import pytest

from vmferry.engine.ports import MoveOrder, Observer, PeerLink
from vmferry.errors import Cancelled, MoveFailed, Refused
from vmferry.host.api import Answer, Happened, Moment
from vmferry.host.moves import Moves, RunningMove
from vmferry.report.records import Event, Progress, Report
from vmferry.strategies import METHODS, Bounds

if TYPE_CHECKING:
    from vmferry.engine.deadman import DeadMan
    from vmferry.guest.process import GuestProcess


@dataclass(frozen=True)
class Guest:
    """What the registry reads of a guest's process."""

    name: str
    pid: int
    qmp: str


def _order(name: str = "g", pid: int = 1) -> MoveOrder:
    return MoveOrder(
        guest=cast("GuestProcess", Guest(name, pid, f"/run/{name}.qmp")),
        method=METHODS["pre-copy"],
        bounds=Bounds(),
        verify=False,
        source_host="a",
        destination_host="b",
        state_dir=Path("/nowhere"),
        deadman=cast("DeadMan", None),
    )


def _report(order: MoveOrder) -> Report:
    return Report(
        guest=order.guest.name, source="a", destination="b", strategy="pre-copy", outcome="moved"
    )


EngineMove = Callable[[MoveOrder, PeerLink, Observer], Awaitable[Report]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[EngineMove], None]:
    """Puts a move of the test's own in the place of the engine's."""

    def put(move: EngineMove) -> None:
        module = ModuleType("vmferry.engine.source")
        vars(module)["move"] = move
        monkeypatch.setitem(sys.modules, "vmferry.engine.source", module)

    return put


def _start(moves: Moves, order: MoveOrder, told: list[Answer] | None = None) -> RunningMove:
    watcher = (told if told is not None else []).append
    return moves.start(order, cast("PeerLink", None), watcher)


async def _until_cancelled(order: MoveOrder, peer: PeerLink, observer: Observer) -> Report:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
    raise AssertionError


def test_a_move_tells_what_it_does_and_ends_in_its_report(
    engine: Callable[[EngineMove], None],
) -> None:
    progress = Progress("round 1", 0.1, 5, 7, 20480, 1e6, None)
    event = Event(0.2, "stopped", "source")

    async def move(order: MoveOrder, peer: PeerLink, observer: Observer) -> Report:
        observer.progress(progress)
        observer.event(event)
        return _report(order)

    async def scenario() -> None:
        moves, told = Moves(), []
        running = _start(moves, _order(), told)
        assert (await running.wait()).outcome == "moved"
        assert told == [Moment(progress=progress), Happened(event=event)]
        assert running.phase == "round 1"
        await asyncio.sleep(0)
        assert moves.outgoing == []

    engine(move)
    asyncio.run(scenario())


def test_a_guest_moves_once_at_a_time_and_others_beside_it(
    engine: Callable[[EngineMove], None],
) -> None:
    async def scenario() -> None:
        moves = Moves()
        _start(moves, _order("g", 1))
        with pytest.raises(Refused, match="guest g is already moving to b"):
            _start(moves, _order("g", 1))
        for name in ("g", "1", "/run/g.qmp"):
            with pytest.raises(Refused, match="guest g is already moving to b"):
                moves.refuse_if_moving(name)
        _start(moves, _order("h", 2))
        assert {one.order.guest.name for one in moves.outgoing} == {"g", "h"}
        await moves.end()

    engine(_until_cancelled)
    asyncio.run(scenario())


def test_a_guest_that_arrives_does_not_move_on(engine: Callable[[EngineMove], None]) -> None:
    async def scenario() -> None:
        moves = Moves()
        with moves.arrival("g", "c"), pytest.raises(Refused, match="still arriving from c"):
            _start(moves, _order())
        running = _start(moves, _order())
        running.cancel()
        await running.wait()

    engine(_until_cancelled)
    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["g", "1", "/run/g.qmp"])
def test_a_move_is_cancelled_by_any_name_of_its_guest(
    engine: Callable[[EngineMove], None], name: str
) -> None:
    async def scenario() -> None:
        moves = Moves()
        running = _start(moves, _order())
        await asyncio.sleep(0)
        moves.find(name).cancel()
        report = await running.wait()
        assert (report.outcome, report.guest) == ("cancelled", "g")
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="no move of guest"):
            moves.find(name)

    engine(_until_cancelled)
    asyncio.run(scenario())


def test_how_it_failed_is_a_report_and_a_refusal_is_not(
    engine: Callable[[EngineMove], None],
) -> None:
    errors: list[Exception] = [
        MoveFailed("the link broke"),
        Cancelled("somebody asked"),
        KeyError("a bug"),
    ]

    async def scenario() -> None:
        moves = Moves()

        async def move(order: MoveOrder, peer: PeerLink, observer: Observer) -> Report:
            raise errors.pop(0)

        engine(move)
        outcomes = []
        for pid in range(3):
            report = await _start(moves, replace(_order(pid=pid))).wait()
            outcomes.append((report.outcome, report.error.split(";")[0]))
        assert outcomes[:2] == [("failed", "the link broke"), ("cancelled", "somebody asked")]
        assert outcomes[2][0] == "failed"
        assert "fault of vmferry's own" in outcomes[2][1]
        errors.append(Refused("it has a passed-through device"))
        with pytest.raises(Refused, match="passed-through"):
            await _start(moves, _order()).wait()

    asyncio.run(scenario())


def test_the_end_waits_for_the_undo_and_lets_nothing_new_in(
    engine: Callable[[EngineMove], None],
) -> None:
    async def scenario() -> None:
        undone: list[str] = []
        may_end = asyncio.Event()

        async def move(order: MoveOrder, peer: PeerLink, observer: Observer) -> Report:
            try:
                await asyncio.Event().wait()
            finally:
                await may_end.wait()
                undone.append(order.guest.name)
            raise AssertionError

        engine(move)
        moves = Moves()
        _start(moves, _order("g", 1))
        _start(moves, _order("h", 2))
        await asyncio.sleep(0)
        ending = asyncio.create_task(moves.end())
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="is ending"):
            _start(moves, _order("i", 3))
        assert not ending.done()
        may_end.set()
        await ending
        assert undone == ["g", "h"]

    asyncio.run(scenario())
