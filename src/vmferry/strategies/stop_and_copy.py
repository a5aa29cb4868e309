"""Stop-and-copy: the baseline of every paper (Clark et al. 2005, section 3; Zap, Xen 1.x)."""

from __future__ import annotations

from vmferry.strategies.session import Session


async def stop_and_copy(session: Session) -> None:
    """Stop; push every page once; resume. The shortest total time and the longest downtime."""
    await session.stop()
    await session.push(await session.scan())
    await session.switch_over()
