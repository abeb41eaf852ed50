"""Numbers of bytes as people read them."""

from __future__ import annotations


def human_bytes(size: float, smallest: str = "B") -> str:
    """A number of bytes in the unit that suits it, such as "1.5 MB" (decimal units); `smallest` names single bytes."""
    for unit in (smallest, "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
