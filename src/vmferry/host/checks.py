"""What can be said before a move: of this machine, of a guest on it, of a paired host.

Each finding is one line for the user. Nothing here changes anything.
"""

from __future__ import annotations

from vmferry.errors import FerryError
from vmferry.host import guests
from vmferry.host.links import Link
from vmferry.host.probe import probe
from vmferry.wire.messages import Finding, Survey, Surveyed

SURVEY_LIMIT_S = 60.0
"""The other host tries everything anew (about a second)."""


def machine_findings() -> list[Finding]:
    """The probe of this machine."""
    return [Finding(c.name, c.ok, c.detail, "" if c.ok else c.remedy) for c in probe()]


async def guest_findings(name: str) -> list[Finding]:
    """Whether a guest can be attached to and moved. Never raises for what a user can cause."""
    try:
        process = await guests.find(name)
    except FerryError as error:
        return [Finding(f"guest {name}", False, str(error))]
    found = [Finding(f"guest {name}", True, f"{process.name}, pid {process.pid}")]
    try:
        reasons = await guests.blockers(process)
    except FerryError as error:
        return [*found, Finding("monitor", False, str(error))]
    found.append(Finding("monitor", True, f"{process.qmp} answers"))
    found += [Finding("movable", False, reason) for reason in reasons]
    if not reasons:
        found.append(Finding("movable", True, "nothing in it keeps it here"))
    return found


async def host_findings(link: Link) -> list[Finding]:
    """Whether a paired host is there, and its own probe. Never raises for what it can cause."""
    try:
        channel = await link.open_control()
    except FerryError as error:
        return [Finding("connection", False, str(error))]
    found = [Finding("connection", True, "answers, is the paired host, speaks the same protocol")]
    try:
        await channel.send(Survey())
        answer = await channel.receive(SURVEY_LIMIT_S)
    except FerryError as error:
        return [*found, Finding("survey", False, str(error))]
    finally:
        await channel.close()
    if not isinstance(answer, Surveyed):
        return [*found, Finding("survey", False, f"{link.name} answered with another message")]
    return [*found, *answer.findings]
