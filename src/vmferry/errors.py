"""Every error a user can meet.

    FerryError
    ├── Refused          nothing was touched; the sentence says what to do
    ├── MoveFailed       the move ended early; the guest runs at the source as before
    ├── Cancelled        somebody asked for it; the guest runs at the source as before
    ├── InDoubt          ownership has passed or may have; the sentence says who holds what
    ├── GuestError       the guest's process or its monitor did not do what was asked
    └── PeerError        the other host, or the way to it, did not do what was asked

A message is one sentence or two: what happened, to which guest and host, what state things are in
now, and what to do. Causes are chained with `raise ... from`, never folded into the text.
"""

from __future__ import annotations


class FerryError(Exception):
    """Base of all of them; `str()` is the sentence for the user."""


class Refused(FerryError):
    """Refused before anything was touched."""


class MoveFailed(FerryError):
    """The move failed before the commit; the guest goes on at the source."""


class Cancelled(FerryError):
    """The move was cancelled before the commit; the guest goes on at the source."""


class InDoubt(FerryError):
    """The source was fenced but the destination did not confirm that the guest runs."""


class GuestError(FerryError):
    """The guest's process or monitor failed, refused or did not answer in time."""


class PeerError(FerryError):
    """The peer, or the way to it, failed, refused or did not answer in time."""
