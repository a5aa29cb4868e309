"""A move, seen from the source: from the order to the report.

The failure contract in one sentence: until `Fence.kill` has begun, any error, cancellation or death
leaves the guest running here as it was; from then on the guest is the destination's, and this side
only helps. docs/failure-contract.md has the table, with a test for each row.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
import uuid
from typing import TypeVar

from vmferry import _core
from vmferry._core import Memory, Sender, Stream
from vmferry.engine import verdict
from vmferry.engine.arrival import clear_departed
from vmferry.engine.attachment import Attachment
from vmferry.engine.deadman import GiveBack
from vmferry.engine.fence import Fence, has_ended
from vmferry.engine.line import Line
from vmferry.engine.ports import MoveOrder, Observer, PeerLink
from vmferry.engine.progress import Pulse
from vmferry.engine.report import make_report
from vmferry.engine.session import EngineSession
from vmferry.engine.steps import Step, Timeline
from vmferry.engine.surely import surely
from vmferry.engine.verdict import Owed, deliver_verdict, owe
from vmferry.engine.verify import compare
from vmferry.errors import (
    Cancelled,
    FerryError,
    GuestError,
    InDoubt,
    MoveFailed,
    PeerError,
    Refused,
)
from vmferry.guest.process import start_time_of
from vmferry.guest.qemu import Qemu
from vmferry.guest.tree import object_tree
from vmferry.network.cards import SourceNetwork
from vmferry.report.records import Event, Report, Verification
from vmferry.wire import messages as m
from vmferry.wire.protocol import ProtocolViolation, Side, State

BULK_STREAMS = 2
PREPARE_LIMIT_S = 60.0
"""For the destination to start its QEMU."""
LOAD_LIMIT_S = 60.0
"""For it to load the device state; with post-copy the load itself waits for pages."""
ANSWER_LIMIT_S = 15.0
REASON_LIMIT_S = 2.0
"""For a peer to say why it has closed the page streams."""
CONT_ATTEMPTS = 10
CONT_RETRY_S = 0.1
"""More before each attempt."""

T = TypeVar("T")


async def move(order: MoveOrder, peer: PeerLink, observer: Observer) -> Report:
    """Moves a guest to a peer. See the module for what holds when it raises.

    Raises Refused (nothing touched), MoveFailed or Cancelled (the guest runs here as before),
    InDoubt (fenced here, not confirmed there). Cancelling the calling task cancels the move up
    to the commit and is without effect after it.
    """
    going = SourceMove(order, peer, observer)
    task = asyncio.create_task(going.run())
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if not going.committing:
                task.cancel()
    return task.result()


class SourceMove:
    """The state of one outgoing move, and its undoing."""

    def __init__(self, order: MoveOrder, peer: PeerLink, observer: Observer) -> None:
        self.order = order
        self.peer = peer
        self.id = uuid.uuid4().hex
        self.committing = False
        self.timeline = Timeline(Side.SOURCE.value, order.state_dir, observer.event)
        self._pulse = Pulse(observer)
        self._cpu_s = _cpu_s()
        self._verification: Verification | None = None
        self._state_bytes = 0
        self._was_running = True
        self._guest: Qemu | None = None
        self._attachment: Attachment | None = None
        self._line: Line | None = None
        self._network: SourceNetwork | None = None
        self._sender: Sender | None = None
        self._session: EngineSession | None = None
        self._fence: Fence | None = None
        self._offered: list[m.BlockShape] = []
        self._stuck = ""
        """Why the guest could not be continued."""

    # --- the way there ------------------------------------------------------------------------

    async def run(self) -> Report:
        """The whole move; undoes itself when it ends before the commit."""
        try:
            session, ready = await self._prepare()
            await self._run_strategy(session)
            return await self._finish(session, ready)
        except BaseException as error:
            if self.committing:
                await surely(self._leave_in_doubt())
                raise _in_doubt(self.order, error) from error
            await surely(self._undo(str(error) or "cancelled"))
            raise _as_ended(self.order, error, self._stuck) from error

    async def _prepare(self) -> tuple[EngineSession, m.Ready]:
        order = self.order
        self._pulse.say("looking at the guest")
        self._guest = guest = await Qemu.attach(order.guest)
        blockers = await guest.blockers()
        if blockers:
            raise Refused(
                f"guest {order.guest.name} cannot be moved: {'; '.join(blockers)}. "
                "Nothing was touched"
            )
        self._was_running = await guest.running()
        self._will(resume=False)
        blocks = await guest.ram()
        self._network = await SourceNetwork.watch(guest.nics())
        channel = await self.peer.open_control()
        self._line = line = Line(channel, Side.SOURCE, self.peer.name)
        memory = Memory(order.guest.pid, [b.block for b in blocks])
        self._offered = [
            m.BlockShape(b.block.name, b.block.length, b.used, b.block.page_size) for b in blocks
        ]
        await line.say(
            m.Offer(
                move=self.id,
                guest=order.guest.name,
                qemu_version=guest.version,
                machine=guest.machine,
                process=m.Process(
                    order.guest.argv,
                    order.guest.exe,
                    order.guest.cwd,
                    order.guest.uid,
                    order.guest.gid,
                ),
                blocks=self._offered,
                tree=await object_tree(guest.monitor),
                cards=_cards(self._network),
                demand_paging=order.method.demand_paging,
                verify=order.verify,
                streams=BULK_STREAMS,
                running=self._was_running,
            )
        )
        await self.timeline.reach(Step.OFFERED)
        self._pulse.say("starting the destination")
        self._attachment = attachment = await Attachment.make(order.guest, memory)
        await self.timeline.reach(Step.ATTACHED)
        expecting = await line.hear(m.Expecting, ANSWER_LIMIT_S)
        bulk, urgent = await self._open_streams(line, expecting.token)
        self._sender = Sender(memory, bulk, urgent)
        self._pulse.sender = self._sender
        await self.timeline.reach(Step.STREAMS_OPEN)
        ready = await line.hear(m.Ready, PREPARE_LIMIT_S)
        await self.timeline.reach(Step.READY)
        self._session = EngineSession(
            guest=guest,
            attachment=attachment,
            sender=self._sender,
            bounds=order.bounds,
            timeline=self.timeline,
            pulse=self._pulse,
            before_stop=self._before_stop,
            hand_over=self._hand_over,
            announce_stop=self._announce_stop,
        )
        return self._session, ready

    async def _open_streams(self, line: Line, token: bytes) -> tuple[list[Stream], Stream]:
        try:
            return await self.peer.open_streams(token, BULK_STREAMS)
        except PeerError:
            # A destination that gives up closes its streams first, and says why after.
            with contextlib.suppress(PeerError):
                await line.hear(m.Ready, REASON_LIMIT_S)
            raise

    async def _run_strategy(self, session: EngineSession) -> None:
        """Runs the strategy; a destination that gives up or a link that breaks ends it at once."""
        line = _held(self._line)
        strategy = asyncio.ensure_future(self.order.method.run(session))
        broken = asyncio.create_task(line.wait_broken())
        try:
            await asyncio.wait({strategy, broken}, return_when=asyncio.FIRST_COMPLETED)
            if not strategy.done() and self.committing:
                # The control connection broke after the commit: the strategy's own calls settle it.
                await asyncio.wait({strategy})
            if not strategy.done():
                raise broken.result()
            strategy.result()
        except _core.CoreError as error:
            # Its reason comes by the control connection, a moment later.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REASON_LIMIT_S):
                    await line.wait_broken()
            reason = line.broken
            raise (
                reason
                if reason is not None
                else PeerError(f"the page streams to {self.peer.name} broke: {error}")
            ) from error
        finally:
            broken.cancel()
            if not strategy.done():
                if self._sender is not None:
                    self._sender.cancel()
                strategy.cancel()
            await asyncio.gather(strategy, broken, return_exceptions=True)

    async def _before_stop(self) -> None:
        await _held(self._guest).prepare_save()
        # The keeper runs nothing, so it may be there before the stop: it costs no downtime then.
        await surely(self._prepare_fence())
        fence = _held(self._fence)
        self._will(resume=self._was_running, keeper=fence.keeper)
        _held(self._sender).set_memory(Memory(fence.keeper, _held(self._attachment).memory.blocks))
        await self.timeline.reach(Step.KEEPER_MADE, f"pid {fence.keeper}")

    async def _prepare_fence(self) -> None:
        self._fence = await Fence.prepare(self.order.guest)

    async def _announce_stop(self) -> None:
        await _held(self._line).say(m.Switch(cards=_cards(_held(self._network))))

    async def _hand_over(self) -> None:
        session, line, guest = _held(self._session), _held(self._line), _held(self._guest)
        clock, fence = session.clock, _held(self._fence)
        if session.owed:
            await asyncio.to_thread(_held(self._sender).serve, session.owed)
            await self.timeline.reach(Step.PAGING_ARMED, f"{len(session.owed)} pages missing")
        state = await _held(session.saving)
        self._state_bytes = len(state)
        await self.timeline.reach(Step.STATE_SAVED, f"{len(state)} bytes")
        if self.order.verify and not session.owed:
            await self._verify(session, _held(self._attachment).memory, m.DigestRequest())
        began = time.monotonic()
        await line.say(m.DeviceState(data=state))
        await self.timeline.reach(Step.STATE_SENT)
        await line.hear(m.Loaded, LOAD_LIMIT_S)
        clock.load_s = time.monotonic() - began
        await self.timeline.reach(Step.LOADED)
        if line.broken is not None:
            raise line.broken
        began = time.monotonic()
        # With pages missing over there the commit is nothing that a next daemon could deliver.
        whole = not self.order.method.demand_paging
        self._will(resume=self._was_running, keeper=fence.keeper, committing=whole)
        # From here on the guest is the destination's: no cancellation, no way back through `cont`.
        self.committing = True
        guest.expect_end()
        await fence.kill()
        await self.timeline.reach(Step.FENCED)
        resumed = await self._commit(line)
        now = time.monotonic()
        clock.resumed = now - resumed.ago_s
        clock.start_s = resumed.start_s
        clock.commit_s = clock.resumed - began - resumed.start_s
        self.timeline.note(Step.RESUMED)

    async def _commit(self, line: Line) -> m.Resumed:
        try:
            await line.say(m.Commit())
            self.timeline.note(Step.COMMITTED)
            return await line.hear(m.Resumed, ANSWER_LIMIT_S)
        except (FerryError, ProtocolViolation):
            resumed = await deliver_verdict(self.peer, self.id, committed=True)
            if resumed is None:
                raise
            return resumed

    async def _verify(self, session: EngineSession, memory: Memory, ask: m.DigestRequest) -> None:
        line = _held(self._line)
        began = time.monotonic()
        await line.say(ask)
        ours, theirs = await asyncio.gather(
            asyncio.to_thread(memory.digests), line.hear(m.Digests, LOAD_LIMIT_S)
        )
        seconds = time.monotonic() - began
        self._verification = compare(memory, ours, theirs, seconds)
        session.clock.verify_s += seconds
        differing = self._verification.pages_differing
        await self.timeline.reach(Step.VERIFIED, f"{differing} pages differ")
        if differing and not self.committing:
            raise MoveFailed(f"{differing} pages differ between both sides at the switch-over")

    async def _finish(self, session: EngineSession, ready: m.Ready) -> Report:
        line, sender, fence = _held(self._line), _held(self._sender), _held(self._fence)
        verify_s = session.clock.verify_s
        if self.order.verify and self.order.method.demand_paging:
            keeper = Memory(fence.keeper, _held(self._attachment).memory.blocks)
            await self._verify(session, keeper, m.DigestRequest())
            session.clock.verify_s = verify_s
        progress = sender.progress()
        farewell = await self._say_farewell(line, sender)
        now = self.timeline.elapsed_s()
        for past in farewell.timeline:
            self.timeline.adopt(
                Event(round(now - past.ago_s, 6), past.name, Side.DESTINATION.value, past.detail)
            )
        self.timeline.note(Step.FINISHED)
        await self._let_go()
        return make_report(
            order=self.order,
            session=session,
            progress=progress,
            timeline=self.timeline,
            farewell=farewell,
            changes=ready.changes,
            verification=self._verification,
            device_state_bytes=self._state_bytes,
            cpu_s=_cpu_s() - self._cpu_s + farewell.cpu_seconds,
        )

    async def _say_farewell(self, line: Line, sender: Sender) -> m.Farewell:
        try:
            await asyncio.to_thread(sender.finish)
            await line.say(m.Finished())
            return await line.hear(m.Farewell, ANSWER_LIMIT_S)
        except (FerryError, ProtocolViolation, _core.CoreError) as error:
            if self.order.method.demand_paging:
                raise
            # It runs there and lacks nothing from here: only what is left to report is lost.
            self.timeline.note(Step.RESUMED, f"no farewell came: {error}")
            return m.Farewell(faults=m.FaultCosts(), timeline=[], cpu_seconds=0.0)

    # --- the ways back ------------------------------------------------------------------------

    def _will(self, *, resume: bool, keeper: int = 0, committing: bool = False) -> None:
        guest = self.order.guest
        self.order.deadman.will(
            self.id,
            GiveBack(
                move=self.id,
                peer=self.peer.name,
                verdicts=str(verdict.folder(self.order.state_dir)),
                qmp=guest.qmp,
                pid=guest.pid,
                start_time=guest.start_time,
                resume=resume,
                keeper=keeper,
                committing=committing,
            ),
        )

    async def _undo(self, reason: str) -> None:
        """Leaves the guest as it was: running if it ran, untracked, and the destination empty."""
        if self._sender is not None:
            self._sender.cancel()
        session, guest = self._session, self._guest
        if guest is not None and session is not None and session.stopping:
            if session.saving is not None:
                await asyncio.gather(session.saving, return_exceptions=True)
            if self._was_running:
                await self._continue(guest)
            if self._network is not None:
                self._network.draw_back()
        await self._abort_destination(reason)
        if self._fence is not None:
            await self._fence.release()
        if self._attachment is not None:
            await self._attachment.detach()
        if self._network is not None:
            await self._network.close()
        if guest is not None:
            await guest.close()
        if not self._stuck:
            self.order.deadman.dismiss(self.id)
        self.timeline.note(Step.UNDONE, reason)

    async def _continue(self, guest: Qemu) -> None:
        for attempt in range(CONT_ATTEMPTS):
            try:
                await guest.cont()
            except GuestError as error:
                # A disk's lock may be somebody else's for a moment.
                self._stuck = str(error)
                if has_ended(self.order.guest.pid, self.order.guest.start_time):
                    return
                await asyncio.sleep(attempt * CONT_RETRY_S)
            else:
                self._stuck = ""
                return

    async def _abort_destination(self, reason: str) -> None:
        line = self._line
        if line is None:
            return
        loaded = line.conversation.state in (State.LOADING, State.LOADED)
        try:
            if line.broken is None and line.conversation.state not in (
                State.GREETED,
                State.ABORTED,
            ):
                await line.say(m.Abort(reason=reason))
                await line.hear(m.Aborted, ANSWER_LIMIT_S)
        except FerryError:
            pass
        if loaded and line.conversation.state is not State.ABORTED:
            # It waits for a verdict, paused and without any lock; it is told as soon as it answers.
            self._owe(committed=False)
        await line.close()

    def _owe(self, *, committed: bool) -> None:
        keeper = 0 if self._fence is None or not committed else self._fence.keeper
        started = start_time_of(keeper) if keeper else 0
        owed = Owed(self.id, self.peer.name, committed, keeper, started)
        owe(verdict.folder(self.order.state_dir), owed)

    async def _let_go(self) -> None:
        """After the commit: nothing here belongs to the guest any more."""
        if self._fence is not None:
            await self._fence.release()
        if self._attachment is not None:
            await self._attachment.detach()
        if self._network is not None:
            await self._network.close()
        if self._guest is not None:
            await self._guest.close()
        if self._line is not None:
            await self._line.close()
        clear_departed(self.order.guest, self.order.state_dir)
        self.order.deadman.dismiss(self.id)

    async def _leave_in_doubt(self) -> None:
        """The keeper, with all the guest's memory, stays: the destination may still need it."""
        if not self.order.method.demand_paging:
            self._owe(committed=True)
        if self._network is not None:
            await self._network.close()
        if self._line is not None:
            await self._line.close()
        self.order.deadman.dismiss(self.id)


def _cards(network: SourceNetwork) -> list[m.NetworkCard]:
    return [m.NetworkCard(c.mac, c.tap, c.bridge, seen) for c, seen in network.cards()]


def _held(thing: T | None) -> T:
    assert thing is not None
    return thing


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _as_ended(order: MoveOrder, error: BaseException, stuck: str) -> BaseException:
    where = f"guest {order.guest.name} runs on at {order.source_host} as before"
    if stuck:
        where = (
            f"guest {order.guest.name} is at {order.source_host} and could not be continued "
            f"({stuck}): say `cont` in its monitor"
        )
    match error:
        case asyncio.CancelledError():
            return Cancelled(f"the move to {order.destination_host} was cancelled; {where}")
        case Refused():
            return error
        case FerryError():
            return MoveFailed(f"the move to {order.destination_host} failed: {error}; {where}")
        case _:
            return error


def _in_doubt(order: MoveOrder, error: BaseException) -> InDoubt:
    return InDoubt(
        f"guest {order.guest.name} was given to {order.destination_host}, which has not confirmed "
        f"that it runs ({error}); its memory is still held here. Look at `vmferry ls` there first"
    )
