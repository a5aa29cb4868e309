"""Tokens, and who comes to trust whom by them."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.host.daemons_in_process import Hosts

from vmferry.errors import PeerError, Refused
from vmferry.host import api
from vmferry.host.identity import load_or_create
from vmferry.host.pairing import (
    INVITATIONS_MAX,
    TOKEN_VALID_S,
    PairingDesk,
    Token,
    check_host_name,
    join,
    parse_address,
)
from vmferry.host.peers import PeerBook

ADDRESSES = st.sampled_from(["127.0.0.1", "fd00::1", "host-1.example"])


@given(ADDRESSES, st.integers(1, 65535), st.binary(min_size=48, max_size=48))
def test_a_token_says_what_it_was_made_of(address: str, port: int, secret: bytes) -> None:
    token = Token(address, port, secret[:32], secret[32:])
    assert Token.parse(f" {token}\n") == token


@given(st.text(max_size=100))
def test_any_other_text_is_no_token(text: str) -> None:
    for candidate in (text, f"vmferry1/127.0.0.1:1/{text}", f"vmferry1/{text}/" + "A" * 63):
        with pytest.raises(Refused, match="not a pairing token"):
            Token.parse(candidate)


@pytest.mark.parametrize("text", ["", ":", "a", "a:", ":1", "a:70000", "a:-1", "a:1x", "[]:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"ADDR:PORT|no address"):
        parse_address(text)


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "a\n", "ä", "a" * 65, "a."])
def test_what_is_no_host_name(name: str) -> None:
    with pytest.raises(Refused, match="--name"):
        check_host_name(name)


def test_two_hosts_pair_and_each_knows_where_the_other_listens(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            for here, there in ((a, b), (b, a)):
                assert there.place is not None
                peer = here.book.find(there.identity.name)
                assert (peer.address, peer.port) == (there.place.address, there.place.port)
                assert peer.fingerprint == there.identity.fingerprint

    asyncio.run(scenario())


def test_a_wrong_secret_is_refused_and_the_right_one_still_works(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            answer = await hosts.ask(a, api.Invite())
            assert isinstance(answer, api.Done)
            token = Token.parse(answer.text)
            with pytest.raises(Refused, match="does not know this token"):
                await hosts.ask(b, api.Pair(token=str(replace(token, secret=bytes(16)))))
            assert a.book.all() == b.book.all() == []
            await hosts.ask(b, api.Pair(token=answer.text))
            assert [peer.name for peer in a.book.all()] == ["b"]

    asyncio.run(scenario())


def test_a_token_pairs_one_host_once(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b, c = [await hosts.start(name) for name in "abc"]
            first = await hosts.ask(a, api.Invite())
            await hosts.ask(a, api.Invite())
            assert isinstance(first, api.Done)
            await hosts.ask(b, api.Pair(token=first.text))
            with pytest.raises(Refused, match="was used"):
                await hosts.ask(c, api.Pair(token=first.text))
            assert [peer.name for peer in a.book.all()] == ["b"]
            assert c.book.all() == []

    asyncio.run(scenario())


def test_nothing_is_told_to_a_host_with_another_certificate(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b, impostor = [await hosts.start(name) for name in ("a", "b", "impostor")]
            answer = await hosts.ask(a, api.Invite())
            await hosts.ask(impostor, api.Invite())
            assert isinstance(answer, api.Done)
            assert impostor.place is not None
            token = str(replace(Token.parse(answer.text), port=impostor.place.port))
            with pytest.raises(PeerError, match="nothing was told"):
                await hosts.ask(b, api.Pair(token=token))
            assert impostor.book.all() == b.book.all() == []

    asyncio.run(scenario())


def test_without_an_invitation_nobody_comes_in(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            assert a.place is not None
            token = Token(a.place.address, a.place.port, a.identity.fingerprint, bytes(16))
            with pytest.raises(PeerError, match="not open any more"):
                await hosts.ask(b, api.Pair(token=str(token)))

    asyncio.run(scenario())


def test_a_host_does_not_pair_with_itself(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a = await hosts.start("a")
            answer = await hosts.ask(a, api.Invite())
            assert isinstance(answer, api.Done)
            with pytest.raises(Refused, match="this host's own"):
                await hosts.ask(a, api.Pair(token=answer.text))

    asyncio.run(scenario())


def test_an_invitation_expires(tmp_path: Path) -> None:
    now = 1000.0
    identity = load_or_create(tmp_path, "a")
    desk = PairingDesk(identity, PeerBook(tmp_path, identity), print, clock=lambda: now)
    desk.invite("127.0.0.1", 1)
    now += TOKEN_VALID_S - 1
    assert desk.is_open()
    now += 2
    assert not desk.is_open()


def test_invitations_are_bounded(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path, "a")
    desk = PairingDesk(identity, PeerBook(tmp_path, identity), print)
    secrets = {desk.invite("127.0.0.1", 1).secret for _ in range(INVITATIONS_MAX)}
    assert len(secrets) == INVITATIONS_MAX
    with pytest.raises(Refused, match="open already"):
        desk.invite("127.0.0.1", 1)


def test_a_proof_is_of_no_use_to_another_certificate(hosts: Hosts, tmp_path: Path) -> None:
    """Who has seen a proof but not the token cannot pair itself with it."""
    from vmferry.host import pairing

    async def scenario() -> None:
        async with hosts.running():
            a = await hosts.start("a")
            answer = await hosts.ask(a, api.Invite())
            assert isinstance(answer, api.Done)
            token = Token.parse(answer.text)
            honest = load_or_create(_made(tmp_path / "honest"), "honest")
            thief = load_or_create(_made(tmp_path / "thief"), "thief")
            proof = pairing._proof(token.secret, token.fingerprint, honest.fingerprint)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pairing, "_proof", lambda *_: proof)
                # The inviter must compute the true one: only the thief's own is replaced.
                accept = a.pairing._accept

                def accept_truly(join: pairing.Join, seen: str) -> None:
                    patch.undo()
                    accept(join, seen)

                patch.setattr(a.pairing, "_accept", accept_truly)
                with pytest.raises(Refused, match="does not know this token"):
                    await join(token, thief, PeerBook(tmp_path / "thief", thief), "", 1)
            assert a.book.all() == []

    asyncio.run(scenario())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_secret_is_not_in_the_log(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            answer = await hosts.ask(a, api.Invite())
            assert isinstance(answer, api.Done)
            await hosts.ask(b, api.Pair(token=answer.text))
            secret = Token.parse(answer.text).secret
            for form in (secret.hex(), base64.b64encode(secret).decode(), answer.text):
                assert form not in caplog.text

    caplog.set_level("DEBUG")
    asyncio.run(scenario())
