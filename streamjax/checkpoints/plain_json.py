"""JSON that every reader reads: JSON knows neither NaN nor infinity, which Python's writer lets through."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(values: Any, indent: int | None = None) -> str:
    """JSON text of plain data; a number that is not finite becomes null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
