"""The protocol of one move as a state machine: no sockets, no clock.

Both hosts hold a `Conversation` of the same table and feed it every message they send and hear,
so both know at any instant what may come next and who may run the guest:

    greeted -offer-> offered -expecting-> expected -ready-> prepared -switch-> switching
      -device-state-> loading -loaded-> loaded -commit-> committed -resumed-> resumed
      -finished-> finishing -farewell-> closed

Up to `loaded` either side may abort, and the source runs the guest afterwards. The commit itself is
not a message: it is the kill of the source's process, proven, between `loaded` and `commit`
(docs/failure-contract.md).
"""

from __future__ import annotations

from enum import Enum

from vmferry.wire import messages as m


class Side(Enum):
    """The two ends of a move."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def other(self) -> Side:
        return Side.DESTINATION if self is Side.SOURCE else Side.SOURCE


class State(Enum):
    """Where a move stands."""

    GREETED = "greeted"
    OFFERED = "offered"
    EXPECTED = "expected"
    PREPARED = "prepared"
    SWITCHING = "switching"
    LOADING = "loading"
    LOADED = "loaded"
    COMMITTED = "committed"
    RESUMED = "resumed"
    FINISHING = "finishing"
    CLOSED = "closed"
    ABORTING = "aborting"
    ABORTED = "aborted"


BEFORE_COMMIT = frozenset(
    {
        State.GREETED,
        State.OFFERED,
        State.EXPECTED,
        State.PREPARED,
        State.SWITCHING,
        State.LOADING,
        State.LOADED,
        State.ABORTING,
        State.ABORTED,
    }
)
"""States in which the guest belongs to the source."""

_SOURCE, _DESTINATION = Side.SOURCE, Side.DESTINATION

_TRANSITIONS: dict[tuple[State, Side, type[m.Message]], State] = {
    (State.GREETED, _SOURCE, m.Offer): State.OFFERED,
    (State.OFFERED, _DESTINATION, m.Expecting): State.EXPECTED,
    (State.OFFERED, _DESTINATION, m.Refuse): State.ABORTED,
    (State.EXPECTED, _DESTINATION, m.Ready): State.PREPARED,
    (State.EXPECTED, _DESTINATION, m.Refuse): State.ABORTED,
    (State.PREPARED, _SOURCE, m.Switch): State.SWITCHING,
    (State.SWITCHING, _SOURCE, m.DigestRequest): State.SWITCHING,
    (State.SWITCHING, _DESTINATION, m.Digests): State.SWITCHING,
    (State.SWITCHING, _SOURCE, m.DeviceState): State.LOADING,
    (State.LOADING, _DESTINATION, m.Loaded): State.LOADED,
    (State.LOADING, _DESTINATION, m.LoadFailed): State.ABORTED,
    (State.LOADED, _SOURCE, m.Commit): State.COMMITTED,
    (State.COMMITTED, _DESTINATION, m.Resumed): State.RESUMED,
    (State.RESUMED, _SOURCE, m.DigestRequest): State.RESUMED,
    (State.RESUMED, _DESTINATION, m.Digests): State.RESUMED,
    (State.RESUMED, _SOURCE, m.Finished): State.FINISHING,
    (State.FINISHING, _DESTINATION, m.Farewell): State.CLOSED,
    (State.ABORTING, _DESTINATION, m.Aborted): State.ABORTED,
    **{
        (state, _SOURCE, m.Abort): State.ABORTING
        for state in BEFORE_COMMIT - {State.GREETED, State.ABORTED}
    },
    # The destination aborts when it has undone everything already: there is nothing to answer.
    **{
        (state, _DESTINATION, m.Abort): State.ABORTED
        for state in BEFORE_COMMIT - {State.GREETED, State.ABORTED}
    },
}


class ProtocolViolation(Exception):
    """A message that may not come in this state; names both."""


class Conversation:
    """One side's view of a move's protocol."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.state = State.GREETED

    @property
    def committed(self) -> bool:
        """Whether ownership has passed, as far as messages tell."""
        return self.state not in BEFORE_COMMIT

    def send(self, message: m.PeerMessage) -> None:
        """To be called before a message is sent; ProtocolViolation if it may not be."""
        self._step(self.side, message)

    def hear(self, message: m.PeerMessage) -> bool:
        """To be called with every message that came. False: it crossed an abort on its way and
        is to be ignored."""
        if (
            self.state is State.ABORTING
            and self.side is Side.SOURCE
            and not isinstance(message, m.Aborted | m.Abort)
        ):
            return False
        self._step(self.side.other, message)
        return True

    def _step(self, sender: Side, message: m.PeerMessage) -> None:
        following = _TRANSITIONS.get((self.state, sender, type(message)))
        if following is None:
            raise ProtocolViolation(
                f"the {sender.value} may not send `{type(message).__struct_config__.tag}` "
                f"while the move is {self.state.value}"
            )
        self.state = following
