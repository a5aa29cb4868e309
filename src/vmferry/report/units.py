"""Numbers as a human reads them: three figures or so, and a unit."""

from __future__ import annotations

PAGE_BYTES = 4096


def milliseconds(value: float) -> str:
    """`0.42 ms`, `15.3 ms`, `1.24 s`."""
    if value >= 1000:
        return seconds(value / 1000)
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"


def seconds(value: float) -> str:
    """`0.512 s`, `3.31 s`, `71.4 s`."""
    if value < 1:
        return f"{value:.3f} s"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def size(count: float) -> str:
    """Bytes in binary units: `512 B`, `78.1 KiB`, `391 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return _three(count, unit)
        count /= 1024
    return _three(count, "GiB")


def _three(value: float, unit: str) -> str:
    if unit == "B" or value >= 100:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def rate(count: float, over_s: float) -> str:
    """Bytes a second, in MB (10^6) as links are sold; empty where no time passed."""
    return f"{count / over_s / 1e6:.0f} MB/s" if over_s > 0 else ""
