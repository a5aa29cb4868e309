"""`vmferry invite`, `pair` and `unpair`."""

from __future__ import annotations

import asyncio
import sys

from vmferry.cli.options import State
from vmferry.host.api import Answer, Done, Invite, Pair, Unpair
from vmferry.host.client import ask
from vmferry.host.state import state_dir


def invite(*, address: str = "", state: State = None) -> int:
    """Print a one-time token for pairing another host; it is valid for 10 minutes.

    Parameters
    ----------
    address
        The address by which the other host reaches this one, if it is not the daemon's own.
    """
    answer = asyncio.run(ask(state_dir(state), Invite(address=address)))
    print(_text(answer))
    if sys.stdout.isatty():
        print("Valid once, for 10 minutes. At the other host: vmferry pair TOKEN", file=sys.stderr)
    return 0


def pair(token: str, /, *, state: State = None) -> int:
    """Pair this host with the one that gave TOKEN: each trusts the other's certificate from now on.

    Parameters
    ----------
    token
        The line that `vmferry invite` printed there.
    """
    print(_text(asyncio.run(ask(state_dir(state), Pair(token=token)))) + ".")
    return 0


def unpair(host: str, /, *, state: State = None) -> int:
    """Trust a paired host no more.

    Parameters
    ----------
    host
        Its name, as `vmferry ls` shows it.
    """
    print(_text(asyncio.run(ask(state_dir(state), Unpair(host=host)))) + ".")
    return 0


def _text(answer: Answer) -> str:
    assert isinstance(answer, Done)
    return answer.text
