"""`vmferry check`."""

from __future__ import annotations

import asyncio

from vmferry.cli.options import State
from vmferry.wire.messages import Finding


def check(guest: str = "", host: str = "", /, *, state: State = None) -> int:
    """Show what this host, a guest and another host can do, and what is missing, a line each.

    Exits with 1 when something is missing without which nothing can be moved.

    Parameters
    ----------
    guest
        Name, PID or QMP socket path of a guest here.
    host
        A paired host, asked through this host's daemon.
    """
    from vmferry.host.api import Check, Findings
    from vmferry.host.checks import guest_findings, machine_findings
    from vmferry.host.client import ask
    from vmferry.host.state import state_dir

    good = _print("this host", machine_findings())
    if guest:
        good &= _print(f"guest {guest}", asyncio.run(guest_findings(guest)))
    if host:
        answer = asyncio.run(ask(state_dir(state), Check(host=host)))
        assert isinstance(answer, Findings)
        good &= _print(f"host {host}", answer.findings)
    return 0 if good else 1


def _print(title: str, findings: list[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    from vmferry.host.probe import OPTIONAL

    print(f"{title}:")
    good = True
    for finding in findings:
        mark = "ok" if finding.ok else "-" if finding.name in OPTIONAL else "MISSING"
        good &= mark != "MISSING"
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        print(f"  {mark:8}{finding.name:20}{finding.detail}{remedy}")
    return good
