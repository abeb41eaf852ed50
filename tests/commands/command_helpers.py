"""Reading what the command lines write."""

import json
import re
from pathlib import Path

BOS = 256


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def numbers(out: str) -> dict[str, float]:
    """The first number of every line of a summary, by the line's first word."""
    found = re.findall(r"^(\w+) +([\d,.]+)", out, re.MULTILINE)
    return {name: float(number.replace(",", "")) for name, number in found}
