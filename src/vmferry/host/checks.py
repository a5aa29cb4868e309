"""What this host can say about another: whether it is there, is itself, and speaks the same."""

from __future__ import annotations

from vmferry.errors import FerryError
from vmferry.host.api import Finding, Findings
from vmferry.host.links import Link


async def check_host(link: Link) -> Findings:
    """One line for each thing found out; never raises for what the peer can cause."""
    try:
        channel = await link.open_control()
    except FerryError as error:
        return Findings(findings=[Finding(f"{link.name}: connection", False, str(error))])
    await channel.close()
    text = (
        f"{link.name} answers, is the host this one was paired with, and speaks the same protocol"
    )
    return Findings(findings=[Finding(f"{link.name}: connection", True, text)])
