"""A move, seen from the destination: from the offer to a guest that depends on nothing elsewhere.

Nothing here ever resumes the guest without the source's word that it has been fenced. Up to that
word whatever ends the move leaves nothing behind. Between Loaded and that word this side may not
decide: if the connection breaks there, the guest is held paused until a verdict comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import secrets
import time
from pathlib import Path

from vmferry import _core
from vmferry._core import Receiver, Stream
from vmferry.engine import doubt
from vmferry.engine.arrival import Waiting, prepare
from vmferry.engine.attachment import demand_paged
from vmferry.engine.deadman import Action, Discard, Keep
from vmferry.engine.line import Line
from vmferry.engine.ports import ChannelLike, DestinationHost, StreamDesk
from vmferry.engine.steps import Step, Timeline
from vmferry.engine.surely import surely
from vmferry.errors import FerryError, GuestError, PeerError, Refused
from vmferry.wire import messages as m
from vmferry.wire.protocol import ProtocolViolation, Side, State

STREAMS_LIMIT_S = 30.0
LOAD_LIMIT_S = 60.0
"""Loading reads guest memory, so with post-copy it may wait for pages."""
Arriving = asyncio.Future[tuple[list[Stream], Stream]]
REASON_LIMIT_S = 5.0
"""For what broke the page streams to show itself."""
DRAIN_LIMIT_S = 30.0
"""For the streams to end after the source has said that it is finished."""

_verdicts: dict[str, asyncio.Future[tuple[ChannelLike, m.Verdict]]] = {}
"""Moves under way, by their id, and where a verdict on one of them goes."""


async def receive(
    channel: ChannelLike, offer: m.Offer, desk: StreamDesk, host: DestinationHost
) -> None:
    """Takes one guest. Owns the channel until it returns; raises nothing that a peer can cause.

    Cancelling the calling task (the daemon ends) undoes the arrival up to the commit.
    """
    move = DestinationMove(channel, offer, desk, host)
    try:
        await move.run()
    finally:
        await surely(channel.close())


async def settle(channel: ChannelLike, verdict: m.Verdict, state_dir: Path) -> None:
    """A verdict on a move whose connection broke; answers when it has been carried out."""
    waiting = _verdicts.get(verdict.move)
    if waiting is None:
        answer = await doubt.settle(doubt.folder(state_dir), verdict)
        with contextlib.suppress(PeerError):
            await channel.send(answer)
        return
    if waiting.done():
        # Being carried out: the source asks again when this connection closes without an answer.
        return
    waiting.set_result((channel, verdict))
    # The move itself answers on this channel; the peer closes it when it has the answer.
    with contextlib.suppress(PeerError):
        await channel.receive(60)


class DestinationMove:
    """The state of one incoming move, and its undoing."""

    def __init__(
        self, channel: ChannelLike, offer: m.Offer, desk: StreamDesk, host: DestinationHost
    ) -> None:
        self._channel = channel
        self._offer = offer
        self._desk = desk
        self._host = host
        self._line = Line(channel, Side.DESTINATION, "the source")
        self._line.hold(offer)
        self._timeline = Timeline(Side.DESTINATION.value, host.state_dir, lambda event: None)
        self._cpu_s = _cpu_s()
        self._waiting: Waiting | None = None
        self._receiver: Receiver | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._verdict: asyncio.Future[tuple[ChannelLike, m.Verdict]] = (
            asyncio.get_running_loop().create_future()
        )
        self._ours = False
        """Whether the commit has been heard: from then on the guest is this side's."""
        self._resumed_at: float | None = None
        self._answered = False

    async def run(self) -> None:
        """Serves the whole move."""
        _verdicts[self._offer.move] = self._verdict
        try:
            await self._run()
        finally:
            del _verdicts[self._offer.move]
            await surely(self._answer_verdict())

    async def _run(self) -> None:
        try:
            await self._take()
            await self._serve()
            await surely(self._end())
        except asyncio.CancelledError:
            if self._line.conversation.state is State.LOADED and not self._ours:
                # The source may be fenced already, so this may be the only copy: it is left as it
                # is, paused, for the operator.
                await surely(self._leave())
            else:
                await surely(self._undo("the destination's daemon is ending"))
            raise
        except Refused as error:
            await surely(self._refuse(str(error)))
        except (FerryError, ProtocolViolation, _core.CoreError, OSError) as error:
            await surely(self._undo(str(error)))

    # --- the way there ------------------------------------------------------------------------

    async def _take(self) -> None:
        offer = self._offer
        token = secrets.token_bytes(16)
        # The streams open while the QEMU starts: neither needs the other.
        arriving = asyncio.ensure_future(self._desk.expect(token, offer.streams))
        try:
            await self._line.say(m.Expecting(token=token))
            self._waiting = waiting = await prepare(offer, self._host)
            self._will(self._discard(waiting))
            await self._timeline.reach(Step.QEMU_STARTED, f"pid {waiting.process.pid}")
            bulk, urgent = await self._streams(arriving)
        finally:
            arriving.cancel()
        self._receiver = Receiver(waiting.memory, bulk, urgent)
        if waiting.userfaultfd is not None:
            blocks = [
                index
                for index, block in enumerate(waiting.memory.blocks)
                if demand_paged(block.name, block.length)
            ]
            self._receiver.serve_faults(waiting.take_userfaultfd(), blocks, offer.verify)
        self._receiving = asyncio.create_task(asyncio.to_thread(self._receiver.wait))
        await self._timeline.reach(Step.STREAMS_OPEN)
        await self._line.say(m.Ready(pid=waiting.process.pid, changes=waiting.changes))
        await self._timeline.reach(Step.READY)

    async def _streams(self, arriving: Arriving) -> tuple[list[Stream], Stream]:
        broken = asyncio.create_task(self._line.wait_broken())
        try:
            async with asyncio.timeout(STREAMS_LIMIT_S):
                await asyncio.wait({arriving, broken}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise PeerError("the source opened no page streams") from None
        finally:
            broken.cancel()
        if not arriving.done():
            raise broken.result()
        return arriving.result()

    async def _serve(self) -> None:
        """Answers messages until the source has finished."""
        while self._line.conversation.state is not State.FINISHING:
            message = await self._next()
            match message:
                case m.Switch():
                    self._held().draw_network(message.cards)
                case m.DigestRequest():
                    await self._line.say(await asyncio.to_thread(self._digests))
                case m.DeviceState():
                    await self._load(message)
                case m.Commit():
                    await self._line.say(await self._resume())
                case m.Abort():
                    raise PeerError(message.reason)
                case _:
                    pass

    async def _next(self) -> m.PeerMessage:
        """The next message; the death of the waiting QEMU or of a stream ends the wait."""
        died = self._held().died
        watched: set[asyncio.Future[None] | asyncio.Future[tuple[ChannelLike, m.Verdict]]] = {
            died,
            self._verdict,
        }
        if not self._ours and self._receiving is not None:
            watched.add(self._receiving)
        getter = asyncio.create_task(self._line.next())
        try:
            await asyncio.wait({getter, *watched}, return_when=asyncio.FIRST_COMPLETED)
            if getter.done():
                return getter.result()
            if died.done():
                raise self._ended()
            if self._verdict.done():
                return await self._await_verdict(PeerError("the connection to the source broke"))
            if self._receiving is not None and self._receiving.done():
                self._receiving.result()
            return await getter
        except PeerError as error:
            if self._line.conversation.state is State.LOADED and not self._ours:
                return await self._await_verdict(error)
            raise
        except _core.CoreError as error:
            # The source closes its streams when it gives up, and a QEMU that is being killed is
            # written to in vain before it is gone: in both cases the reason comes a moment later.
            await asyncio.wait(
                {getter, died}, timeout=REASON_LIMIT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if died.done():
                raise self._ended() from error
            if getter.done() and getter.exception() is None:
                return getter.result()
            if self._line.conversation.state is State.LOADED and not self._ours:
                return await self._await_verdict(PeerError(str(error)))
            raise
        finally:
            getter.cancel()

    def _ended(self) -> GuestError:
        return GuestError(f"the waiting QEMU ended: {self._held().last_words()}")

    async def _await_verdict(self, reason: PeerError) -> m.PeerMessage:
        """In doubt: paused, complete, without a lock. Only the source knows how it ended."""
        _, verdict = await self._verdict
        if verdict.committed and not self._ours:
            await self._resume()
        raise reason

    async def _answer_verdict(self) -> None:
        """When the move is over, so that the answer says what has become of it; none when the
        guest is ours and does not run: the source asks again then, and `doubt` tries again."""
        if not self._verdict.done() or self._answered:
            return
        self._answered = True
        channel, _ = self._verdict.result()
        with contextlib.suppress(PeerError):
            if not self._ours:
                await channel.send(m.Aborted())
            elif self._resumed_at is not None:
                ago_s = time.monotonic() - self._resumed_at
                await channel.send(m.Resumed(ago_s=ago_s, start_s=0.0))
        await channel.close()

    async def _load(self, message: m.DeviceState) -> None:
        waiting = self._held()
        try:
            await waiting.guest.load_device_state(message.data, LOAD_LIMIT_S)
        except FerryError as error:
            await self._kill()
            await self._line.say(m.LoadFailed(reason=f"the destination's QEMU: {error}"))
            raise
        # In doubt from here: the will may not kill what may be the only copy.
        self._will(self._keep(waiting))
        await self._line.say(m.Loaded())
        await self._timeline.reach(Step.LOADED)

    async def _resume(self) -> m.Resumed:
        waiting = self._held()
        began = time.monotonic()
        self._ours = True
        self._will(self._keep(waiting))
        if not self._offer.running:
            await self._timeline.reach(Step.COMMITTED, "the guest was paused and stays so")
            self._resumed_at = time.monotonic()
            return m.Resumed(ago_s=0.0, start_s=0.0)
        await self._timeline.reach(Step.COMMITTED)
        resumed_ns = await waiting.guest.cont()
        ago_s = (time.time_ns() - resumed_ns) / 1e9
        self._resumed_at = time.monotonic() - ago_s
        self._timeline.note(Step.RESUMED)
        return m.Resumed(ago_s=ago_s, start_s=time.monotonic() - ago_s - began)

    async def _end(self) -> None:
        """The source depends on us for nothing, and soon we depend on it for nothing."""
        waiting, receiver = self._held(), self._receiver
        assert receiver is not None
        assert self._receiving is not None
        async with asyncio.timeout(DRAIN_LIMIT_S):
            await self._receiving
        faults = receiver.fault_stats()
        await asyncio.to_thread(receiver.release)
        await waiting.independent()
        self._timeline.note(Step.FINISHED)
        now = self._timeline.elapsed_s()
        await self._line.say(
            m.Farewell(
                faults=m.FaultCosts(
                    network_faults=faults.network_faults,
                    prefetch_hits=faults.served_under_way,
                    zero_faults=faults.zero_faults,
                    latency_us_p50=faults.latency_us_p50,
                    latency_us_p99=faults.latency_us_p99,
                    latency_us_max=faults.latency_us_max,
                    stall_ms=faults.stall_ms,
                    discarded_pages=faults.discarded_pages,
                ),
                timeline=[
                    m.PastEvent(now - event.at_s, event.name, event.detail)
                    for event in self._timeline.events
                ],
                cpu_seconds=_cpu_s() - self._cpu_s,
            )
        )
        self._will()
        await self._line.close()

    def _digests(self) -> m.Digests:
        receiver, memory = self._receiver, self._held().memory
        assert receiver is not None
        if not self._offer.demand_paging:
            return m.Digests(data=memory.digests())
        discarded = receiver.discarded()
        return m.Digests(
            data=receiver.installed_digests(),
            discarded=[
                (block, start, stop)
                for block in range(len(memory.shape))
                for start, stop in discarded.ranges(block)
            ],
        )

    # --- the ways back ------------------------------------------------------------------------

    def _discard(self, waiting: Waiting) -> Discard:
        process = waiting.process
        return Discard(process.pid, process.start_time, str(waiting.directory))

    def _keep(self, waiting: Waiting) -> Keep:
        process = waiting.process
        guest = doubt.Doubt(
            move=self._offer.move,
            qmp=process.qmp,
            pid=process.pid,
            start_time=process.start_time,
            directory=str(waiting.directory),
            resume=self._offer.running,
            committed=self._ours,
        )
        return Keep(str(doubt.folder(self._host.state_dir)), guest)

    async def _kill(self) -> None:
        if self._receiver is not None:
            self._receiver.cancel()
        if self._waiting is not None:
            await self._waiting.discard()
            self._waiting = None

    async def _refuse(self, reason: str) -> None:
        await self._kill()
        with contextlib.suppress(PeerError, ProtocolViolation):
            if self._line.conversation.state in (State.OFFERED, State.EXPECTED):
                await self._line.say(m.Refuse(reason=reason))
        await self._close()

    async def _undo(self, reason: str) -> None:
        """Before the commit: leave nothing. After it: the guest is ours and stays."""
        if self._ours:
            await self._leave()
            return
        await self._kill()
        with contextlib.suppress(PeerError, ProtocolViolation):
            state = self._line.conversation.state
            if state is State.ABORTING:
                await self._line.say(m.Aborted())
            elif state not in (State.ABORTED, State.GREETED):
                await self._line.say(m.Abort(reason=reason))
        await self._close()

    async def _leave(self) -> None:
        """Lets the QEMU be. With pages missing its userfaultfd stays open inside it, so that the
        guest waits for them instead of reading zeros."""
        if self._waiting is not None:
            kept = self._keep(self._waiting)
            doubt.keep(Path(kept.doubts), kept.doubt)
            await self._waiting.let_go()
        await self._answer_verdict()
        if self._receiver is not None and not self._offer.demand_paging:
            self._receiver.cancel()
        await self._close()

    async def _close(self) -> None:
        await self._line.close()
        if self._receiving is not None:
            await asyncio.gather(self._receiving, return_exceptions=True)
        self._will()

    def _held(self) -> Waiting:
        assert self._waiting is not None
        return self._waiting

    def _will(self, *actions: Action) -> None:
        self._host.deadman.will(self._offer.move, *actions)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
