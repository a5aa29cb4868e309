"""The protocol's state machine, explored exhaustively: it is small enough to enumerate."""

from __future__ import annotations

import pytest

from vmferry.wire import messages as m
from vmferry.wire.protocol import BEFORE_COMMIT, Conversation, ProtocolViolation, Side, State

SAMPLES: list[m.PeerMessage] = [
    m.Offer(
        move="m",
        guest="g",
        qemu_version="10.0.2",
        machine="pc-q35-10.0",
        process=m.Process([], "", "", 0, 0),
        blocks=[],
        tree={},
        demand_paging=False,
        verify=False,
        running=True,
        streams=2,
    ),
    m.Expecting(token=b""),
    m.Ready(pid=1, changes=[]),
    m.Refuse(reason=""),
    m.Switch(),
    m.DigestRequest(),
    m.Digests(data=b""),
    m.DeviceState(data=b""),
    m.Loaded(),
    m.LoadFailed(reason=""),
    m.Commit(),
    m.Resumed(ago_s=0.0, start_s=0.0),
    m.Finished(),
    m.Farewell(faults=m.FaultCosts(), timeline=[], cpu_seconds=0.0),
    m.Abort(reason=""),
    m.Aborted(),
    m.Verdict(move="m", committed=True),
]


def legal(state: State, side: Side) -> list[m.PeerMessage]:
    """Messages that `side` may send in `state`."""
    allowed = []
    for message in SAMPLES:
        conversation = Conversation(side)
        conversation.state = state
        try:
            conversation.send(message)
        except ProtocolViolation:
            continue
        allowed.append(message)
    return allowed


def test_both_sides_agree_wherever_a_move_can_get() -> None:
    reached, frontier = {State.GREETED}, [State.GREETED]
    while frontier:
        state = frontier.pop()
        for sender in Side:
            for message in legal(state, sender):
                ours, theirs = Conversation(sender), Conversation(sender.other)
                ours.state = theirs.state = state
                ours.send(message)
                assert theirs.hear(message)
                assert ours.state is theirs.state
                if ours.state not in reached:
                    reached.add(ours.state)
                    frontier.append(ours.state)
    assert reached == set(State)


@pytest.mark.parametrize("state", State)
def test_only_commit_crosses_the_line(state: State) -> None:
    for sender in Side:
        for message in legal(state, sender):
            conversation = Conversation(sender)
            conversation.state = state
            conversation.send(message)
            if state in BEFORE_COMMIT and conversation.committed:
                assert isinstance(message, m.Commit)
                assert sender is Side.SOURCE
                assert state is State.LOADED
            if state not in BEFORE_COMMIT:
                assert conversation.committed


@pytest.mark.parametrize("state", State)
def test_abort_exactly_up_to_the_commit(state: State) -> None:
    may_abort = any(isinstance(x, m.Abort) for side in Side for x in legal(state, side))
    assert may_abort == (state in BEFORE_COMMIT - {State.GREETED, State.ABORTED})


def test_a_message_that_crossed_an_abort_is_ignored() -> None:
    source = Conversation(Side.SOURCE)
    source.state = State.LOADING
    source.send(m.Abort(reason="changed my mind"))
    assert not source.hear(m.Loaded())
    assert source.state is State.ABORTING
    assert source.hear(m.Aborted())
    assert source.state is State.ABORTED


def test_a_violation_names_the_message_and_the_state() -> None:
    destination = Conversation(Side.DESTINATION)
    destination.state = State.PREPARED
    with pytest.raises(ProtocolViolation, match="`commit` while the move is prepared"):
        destination.hear(m.Commit())
