"""The strategies in virtual time: a link, a guest with a write pattern, and a check of truth."""

from __future__ import annotations

from vmferry.simulator.clock import VirtualDeadlock, VirtualLoop
from vmferry.simulator.guest import GuestModel, Pattern
from vmferry.simulator.link import LinkModel
from vmferry.simulator.run import simulate
from vmferry.simulator.session import BrokenStrategy, Costs

__all__ = [
    "BrokenStrategy",
    "Costs",
    "GuestModel",
    "LinkModel",
    "Pattern",
    "VirtualDeadlock",
    "VirtualLoop",
    "simulate",
]
