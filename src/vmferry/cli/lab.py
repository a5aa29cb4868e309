"""`vmferry lab`: the demo, and the way to get rid of what a dead lab has left."""

from __future__ import annotations

import asyncio

from cyclopts import App

app = App(name="lab", help="Two hosts, a client and guests on this one machine.")


@app.command
def demo() -> int:
    """Move a real Linux guest three ways between two hosts, and twice by QEMU itself.

    Takes under four minutes and leaves nothing behind. Needs root.
    """
    from vmferry.lab.demo import run

    return asyncio.run(run())


@app.command
def clean() -> int:
    """Remove what labs that died have left: processes, namespaces, files."""
    from vmferry.lab import leftovers

    for name in leftovers.clean():
        print(f"removed what lab {name} had left")
    return 0
