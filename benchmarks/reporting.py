"""What every benchmark here shares: turns in one process or in several, a table on the terminal, JSON beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times, the runs taking turns so that a noisy machine treats them alike."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def in_own_process(module: str, *arguments: Any, python: str = sys.executable) -> dict[str, Any]:
    """Run a module in a process of its own, by this Python or another one, to its end; the JSON of its last line.

    Raises:
      RuntimeError: it failed; its last words.
    """
    command = [python, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(
    module: str, rounds: int, cases: Mapping[tuple[str, str], Sequence[Any]], *common: Any
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What `module --child` says of each case, by rounds in which each has a process of its own; `common` comes first.

    Args:
      cases: what is compared and the side, with the arguments behind `--child`.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    for turn in range(rounds):
        for (kind, side), own in cases.items():
            found[kind, side].append(in_own_process(module, *common, "--child", *own))
            print(f"round {turn + 1} of {rounds}, {side}, {kind}: {found[kind, side][-1]}", flush=True)
    return found


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over turns of slow / fast: each turn is a pair under the same load."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    import jax
    import jaxlib

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "device": str(jax.devices()[0].device_kind),
        "backend": jax.default_backend(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a GitHub table, with all columns that any of them has; a dash where one has nothing in it."""
    heads = list(dict.fromkeys(head for row in sorted(rows, key=len, reverse=True) for head in row))
    each = [[row.get(head, "-") for head in heads] for row in rows]
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in values] for values in each]
    widths = [max(len(h), *(len(c[i]) for c in cells)) for i, h in enumerate(heads)]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    return "\n".join([line(heads), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, cells)])


def report(name: str, rows: Sequence[Mapping[str, Any]], output: Path | None = None, **extra: Any) -> None:
    """Print the table and write `results/<name>.json` with the machine that made it."""
    print(table(rows))
    path = output or RESULTS / f"{name}.json"
    _write(path, name, rows, **extra)
    print(f"written: {path}")


def _write(path: Path, name: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), **extra, "rows": list(rows)}, indent=1) + "\n")


class Record:
    """The rows of a benchmark that takes long, written after each: a run that was ended goes on behind them.

    A file says `unfinished` until its run is over. The next run goes on from it if its settings are the same;
    otherwise, and where the file is whole, it begins anew.

    Args:
      name: of the benchmark, such as "serving/load".
      output: the file; None: `results/<name>.json`.
      resumes: False begins anew in any case.
      settings: what the figures belong to, as plain data. They are written beside the rows.

    Example:
      >>> record = Record("serving/guesses", None, model="SmolLM2", tokens=96)
      >>> if not record.has(rows=4, text="chat"):
      ...     record.add({"rows": 4, "text": "chat", "a pass": 1.1})
      >>> record.finish()
    """

    def __init__(self, name: str, output: Path | None = None, resumes: bool = True, **settings: Any):
        self._name, self._settings = name, settings
        self._path = output or RESULTS / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        if resumes and self._path.exists():
            before = json.loads(self._path.read_text())
            if before.get("unfinished") and {key: before.get(key) for key in settings} == settings:
                self.rows = before["rows"]
                print(f"goes on behind {len(self.rows)} rows of {self._path}", file=sys.stderr)

    def has(self, **values: Any) -> bool:
        """Whether a row with these values is there."""
        return any(values.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Print and write a row."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        _write(self._path, self._name, self.rows, unfinished=True, **self._settings)

    def finish(self, **extra: Any) -> None:
        """The run is over: `report`, which also writes what else is known now."""
        report(self._name, self.rows, self._path, **self._settings, **extra)
