"""Files that a command writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write plain data; the folder is made."""
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
