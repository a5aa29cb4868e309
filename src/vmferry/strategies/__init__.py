"""One file an algorithm, and the session interface they are written against."""

from __future__ import annotations

from dataclasses import dataclass

from vmferry.strategies.post_copy import post_copy
from vmferry.strategies.pre_copy import pre_copy
from vmferry.strategies.session import Bounds, Push, Session, Strategy
from vmferry.strategies.stop_and_copy import stop_and_copy


@dataclass(frozen=True)
class Method:
    """A strategy by its public name, and what it needs of the destination."""

    name: str
    run: Strategy
    demand_paging: bool
    """Whether the guest may run at the destination while pages are missing."""


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("pre-copy", pre_copy, demand_paging=False),
        Method("post-copy", post_copy, demand_paging=True),
        Method("stop-and-copy", stop_and_copy, demand_paging=False),
    )
}

__all__ = ["METHODS", "Bounds", "Method", "Push", "Session", "Strategy"]
