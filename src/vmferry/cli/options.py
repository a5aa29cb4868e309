"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmferry.errors import Refused

State = Annotated[
    Path | None,
    Parameter(
        name="--state",
        env_var="VMFERRY_STATE",
        help="State directory of the daemon (default: /var/lib/vmferry as root).",
    ),
]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|min)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_duration(text: str) -> float:
    """Seconds of `50ms`, `0.3s`, `2min`. Refused."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise Refused(f"{text!r} is not a duration; write it like 50ms, 0.3s or 2min")
    return float(found[1]) * _SECONDS[found[2]]
