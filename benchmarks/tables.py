"""Write docs/benchmarks.md from the JSON that the benchmarks left in benchmarks/results/.

python -m benchmarks.tables

Some benchmarks have their tables on a page of their own, between two marks, and write them by themselves (`--page`).
"""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path

from benchmarks.reporting import RESULTS, table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
ELSEWHERE = (
    "backprop/memory",
    "backprop/memory_model",
    "kernels/schedules/flash",
    "kernels/schedules/hsa",
    "kernels/schedules/decode",
    "kernels/schedules/recurrence",
    "kernels/compile_all",
    "kernels/cross_entropy",
    "kernels/gpu/all_kernels",
    "models/context_on_tpu",
    "models/experts_on_tpu",
    "models/ten_million_on_tpu",
    "models/token_halves",
    "training/distillation",
    "training/post_training",
)
HEAD = """# Benchmarks

Every table is what a script printed, on the machine named below it. Ratios are medians over turns that alternate: in
one process where both sides are streamjax, each side in a process of its own where they are not, since two runtimes in
one process disturb each other. Absolute figures move with the machine. This page is written by
`python -m benchmarks.tables` from `benchmarks/results/`.
"""


def section(path: Path) -> str:
    """One benchmark: what it measures (its script's text), its table, its machine."""
    result = json.loads(path.read_text())
    name = result["benchmark"]
    module = "benchmarks." + name.replace("/", ".")
    script = Path(__file__).parent / f"{name}.py"
    text = ast.get_docstring(ast.parse(script.read_text()), clean=False) or ""
    title, _, rest = text.strip().partition("\n")
    body = "\n".join(line for line in rest.splitlines() if not line.startswith("    ")).strip()
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, backend {machine['backend']}, JAX {machine['jax']}"
    where += f", Python {machine['python']}, load average {machine['load_average']} at the end"
    if "torch" in result:
        where += f"; torch {result['torch']}, transformers {result['transformers']}"
    command = f"```\npython -m {module}\n```"
    notes = [textwrap.fill(result["note"], 120)] if "note" in result else []
    notes += ["The run was ended before its last row."] if result.get("unfinished") else []
    return "\n\n".join([f"## {title.rstrip('.')}", body, command, table(result["rows"]), *notes, f"*{where}*\n"])


def put(page: Path, name: str, text: str) -> None:
    """Put a benchmark's tables between its two marks of a page.

    Raises:
      ValueError: the page lacks a mark.
    """
    begin, end = f"<!-- benchmarks/{name}.py writes from here -->", "<!-- to here -->"
    before, first, rest = page.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page} lacks the lines {begin!r} and {end!r}, between which the tables go")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
    print(f"written: {page}")


def page() -> str:
    """The text of docs/benchmarks.md."""
    here = [
        path
        for path in sorted(RESULTS.rglob("*.json"))
        if path.relative_to(RESULTS).with_suffix("").as_posix() not in ELSEWHERE
    ]
    return "\n".join([HEAD, *map(section, here)])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
