"""`vmferry move` and `vmferry cancel`."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmferry.cli.main import EXIT_FAILED, EXIT_INTERRUPTED, say
from vmferry.cli.options import State, parse_duration

if TYPE_CHECKING:
    from vmferry.cli.progress import Display
    from vmferry.host.api import Move
    from vmferry.report.records import Report


def move(
    guest: str,
    host: str,
    /,
    *,
    strategy: Literal["pre-copy", "post-copy", "stop-and-copy"] = "pre-copy",
    max_downtime: str = "50ms",
    verify: bool = False,
    json: bool = False,
    quiet: bool = False,
    state: State = None,
) -> int:
    """Move a running guest to a paired host.

    Ctrl-C cancels: the guest goes on here as before. Closing the terminal does not: the move is
    the daemon's. Exits with 0 when moved, 1 when refused or failed, 130 when cancelled.

    Parameters
    ----------
    guest
        Name, PID or QMP socket path of a running QEMU.
    host
        A paired host, by its name.
    strategy
        How its memory moves.
    max_downtime
        Pre-copy stops the guest when the rest is expected to take no longer.
    verify
        Compare the whole memory of both sides.
    json
        Print the report as one JSON object.
    quiet
        Show no progress.
    """
    from vmferry.cli.progress import make_display
    from vmferry.host.api import Move
    from vmferry.host.state import state_dir

    request = Move(
        guest=guest,
        host=host,
        strategy=strategy,
        max_downtime_s=parse_duration(max_downtime),
        verify=verify,
    )
    display = make_display(guest, quiet=quiet)
    try:
        report = asyncio.run(_follow(state_dir(state), request, display))
    finally:
        display.close()
    _print(report, json=json)
    if report.outcome == "moved":
        return 0
    say(report.error)
    return EXIT_INTERRUPTED if report.outcome == "cancelled" else EXIT_FAILED


def cancel(guest: str, /, *, state: State = None) -> int:
    """Cancel a running move, and wait until the guest is back as it was.

    Parameters
    ----------
    guest
        Name, PID or QMP socket path of the guest.
    """
    from vmferry.host.api import Cancel, Done
    from vmferry.host.client import ask
    from vmferry.host.state import state_dir

    answer = asyncio.run(ask(state_dir(state), Cancel(guest=guest)))
    assert isinstance(answer, Done)
    print(answer.text + ".")
    return 0


class _Interrupts:
    """Ctrl-C while a move runs: cancel it; say that it goes on undoing; leave."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._count = 0
        self.cancel = asyncio.Event()
        self.leave = asyncio.Event()

    def on_signal(self) -> None:
        self._count += 1
        if self._count == 1:
            self._display.say("Cancelling; waiting until the guest is as it was.")
            self.cancel.set()
        elif self._count == 2:
            self._display.say(
                "The daemon goes on undoing the move, whatever happens here; still waiting "
                "(Ctrl-C once more leaves)."
            )
        else:
            self.leave.set()


async def _follow(directory: Path, request: Move, display: Display) -> Report:
    """Shows a move until its end. KeyboardInterrupt when the user leaves before."""
    from vmferry.errors import InDoubt, PeerError, Refused
    from vmferry.host.api import Cancel, Ended, Failed, Moment
    from vmferry.host.client import connected, raise_failed
    from vmferry.report.records import Report

    interrupts = _Interrupts(display)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupts.on_signal)
    async with connected(directory) as daemon:
        await daemon.send(request)

        async def pass_on() -> None:
            await interrupts.cancel.wait()
            await daemon.send(Cancel())

        async def leave() -> None:
            await interrupts.leave.wait()

        async def watch() -> Report:
            while True:
                # Without a limit: a move takes as long as it takes, and Ctrl-C is always there.
                match await daemon.receive(None):
                    case Moment(progress):
                        display.show(progress)
                    case Ended(report):
                        return report
                    case Failed() as failed:
                        raise_failed(failed)

        watching = asyncio.create_task(watch())
        others = [asyncio.create_task(pass_on()), asyncio.create_task(leave())]
        try:
            await asyncio.wait({watching, others[1]}, return_when=asyncio.FIRST_COMPLETED)
            if not watching.done():
                raise KeyboardInterrupt
            return watching.result()
        except Refused as error:
            return Report(
                guest=request.guest,
                source="",
                destination=request.host,
                strategy=request.strategy,
                outcome="failed",
                error=str(error),
            )
        except PeerError as error:
            raise InDoubt(
                f"the daemon ended before it said how the move of {request.guest} ended; where it "
                "has not passed its commit the guest goes on here as before: start the daemon and "
                "look at `vmferry ls`"
            ) from error
        finally:
            for task in (watching, *others):
                task.cancel()
            await asyncio.gather(watching, *others, return_exceptions=True)


def _print(report: Report, *, json: bool) -> None:
    if json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        return
    if report.outcome != "moved":
        return
    from rich.console import Console

    from vmferry.report.table import summary

    Console(highlight=False).print(summary(report))
