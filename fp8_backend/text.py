"""Sizes and times as the commands print them."""

from __future__ import annotations

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def readable_size(size: int) -> str:
    """Return a number of bytes as kB or MB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def readable_age(seconds: float) -> str:
    """Return a time in its largest unit; one in the future, which a skewed clock gives, is 0 s."""
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0, seconds):.0f} s"
