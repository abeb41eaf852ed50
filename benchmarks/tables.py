"""Write docs/benchmarks.md from the JSON that the benchmarks left in benchmarks/results/.

python -m benchmarks.tables
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from benchmarks.common import RESULTS, table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Every table is what a script printed, on the machine named below it. Ratios are medians over turns that alternate in one
process; absolute figures move with the machine. This page is written by `python -m benchmarks.tables` from
`benchmarks/results/`.
"""


def section(path: Path) -> str:
    """One benchmark: what it measures (its script's text), its table, its machine."""
    result = json.loads(path.read_text())
    name = result["benchmark"]
    text = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip()
    title, _, rest = text.partition("\n")
    body = "\n".join(line for line in rest.splitlines() if not line.startswith("    ")).strip()
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, backend {machine['backend']}, JAX {machine['jax']}"
    where += f", Python {machine['python']}, load average {machine['load_average']} at the end"
    if "torch" in result:
        where += f"; torch {result['torch']}, transformers {result['transformers']}"
    command = f"```\npython -m benchmarks.{name}\n```"
    return "\n\n".join([f"## {title.rstrip('.')}", body, command, table(result["rows"]), f"*{where}*\n"])


def main() -> None:
    PAGE.write_text("\n".join([HEAD, *(section(path) for path in sorted(RESULTS.glob("*.json")))]))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
