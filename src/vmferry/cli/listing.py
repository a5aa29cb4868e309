"""`vmferry ls`."""

from __future__ import annotations

import asyncio
import sys

from vmferry.cli.options import State


def ls(*, json: bool = False, state: State = None) -> int:
    """List the guests of this host and its paired hosts.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    from vmferry.host.api import List, Listing
    from vmferry.host.client import ask
    from vmferry.host.pairing import format_address
    from vmferry.host.state import state_dir

    listing = asyncio.run(ask(state_dir(state), List()))
    assert isinstance(listing, Listing)
    if json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(listing).decode() + "\n")
        return 0
    print(f"{listing.host}, reached by {format_address(listing.address, listing.port)}")
    _print_table(
        ("GUEST", "PID", "STATE"),
        [(guest.name, str(guest.pid or "-"), guest.state) for guest in listing.guests],
        "no guest runs here",
    )
    _print_table(
        ("HOST", "ADDRESS"),
        [(peer.name, format_address(peer.address, peer.port)) for peer in listing.peers],
        "no host is paired; `vmferry invite` begins it",
    )
    return 0


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]], none: str) -> None:
    print()
    if not rows:
        print(none)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
