"""`vmferry host`."""

from __future__ import annotations

import logging
import socket
import sys

from vmferry.cli.options import State
from vmferry.errors import Refused

DEFAULT_LISTEN = "0.0.0.0:7450"


def host(
    *,
    listen: str = DEFAULT_LISTEN,
    state: State = None,
    name: str | None = None,
    address: str = "",
    verbose: bool = False,
) -> int:
    """Run the daemon of this host, in the foreground.

    It ends on SIGTERM, SIGINT or SIGHUP, after undoing the moves under way; it never ends a guest.

    Parameters
    ----------
    listen
        ADDR:PORT for other hosts; port 0 takes a free one.
    name
        What other hosts call this one (default: the machine's host name).
    address
        The address by which other hosts reach this one, if it is not the one listened on.
    verbose
        Log every small thing, too.
    """
    from vmferry.host.daemon import Settings, run
    from vmferry.host.pairing import parse_address
    from vmferry.host.state import state_dir

    try:
        listen_address, listen_port = parse_address(listen)
    except ValueError as error:
        raise Refused(f"--listen wants ADDR:PORT, like {DEFAULT_LISTEN}: {error}") from error
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)-7s %(message)s",
    )
    if not verbose:
        # What a stranger's broken handshake makes asyncio say; the listener says it itself.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    settings = Settings(
        state_dir=state_dir(state),
        name=name or socket.gethostname(),
        listen_address=listen_address,
        listen_port=listen_port,
        advertised=address,
    )
    run(settings, ready=lambda line: print(line, flush=True))
    return 0
