"""Pre-copy (Clark et al., NSDI 2005, sections 3 and 5.1; Theimer et al., SOSP 1985)."""

from __future__ import annotations

from vmferry.strategies.session import Session


async def pre_copy(session: Session) -> None:
    """Push everything, then rounds of what was dirtied meanwhile, until the rest fits the downtime
    asked for, or a bound on rounds or on pages pushed is reached; stop; push the rest; resume.
    """
    bounds = session.bounds
    to_push = await session.scan()
    for _ in range(bounds.max_rounds):
        await session.push(to_push)
        to_push = await session.scan()
        if session.push_time(to_push) <= bounds.max_downtime_s:
            break
        if session.pushed_pages >= bounds.max_total_factor * session.total_pages:
            break
    await session.stop()
    await session.scan()
    await session.push(session.owed)
    await session.switch_over()
