"""The rows of a leaderboard: read from files, summarised, and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamjax.byte_units import human_bytes
from streamjax.checkpoints import user_path
from streamjax.checkpoints.json_files import read_json


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: the standard deviation by the root of how many there are; NaN of one."""
    error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    return statistics.fmean(scores), error


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file of results, each with the mean of its tasks.

    Raises:
      ValueError: a file of another form.
    """
    rows = read_json(user_path(name)).get("rows")
    try:
        assert isinstance(rows, list)
        for row in rows:
            row.setdefault("source", Path(name).stem)
            row["label"] = f"{row['method']} {row['source']}"
            means = [float(task["mean"]) for task in row["tasks"].values()]
            row["mean"] = statistics.fmean(means)
            float(row.get("budget") or 0.0)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, statistics.StatisticsError):
        form = '{"rows": [{"method": "snapkv", "budget": 0.25, "tasks": {"vt": {"mean": 0.9}}}]}'
        raise ValueError(f"{name}: no file of results; it has to look like {form}") from None
    return rows


def summarise(row: dict[str, Any]) -> None:
    """The mean over a row's tasks, each task counting alike, and its standard error."""
    found = row["tasks"].values()
    row["mean"] = statistics.fmean(task["mean"] for task in found)
    errors = [
        math.nan if task["standard_error"] is None else task["standard_error"] for task in found
    ]  # of one example
    row["standard_error"] = sum(error**2 for error in errors) ** 0.5 / len(errors)


def table(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Rows as text: scores in per cent with their standard errors, and what they took."""
    head = ["cache", "bytes", *tasks, "mean", "perplexity", "read/s", "written/s", "state", "bytes/token"]
    lines = [head]
    for row in rows:
        scores = [_percent(row["tasks"].get(task)) for task in tasks]
        timing = row.get("timing", {}).values()
        read, written = ([task[which] for task in timing] for which in ("read", "written"))
        name = row["method"] + (f" ({row['source']})" if row.get("source") else "")
        size, share = row.get("state_bytes"), row.get("budget")
        lines.append([
            name, "-" if share is None else f"{share:.3g}", *scores, _percent(row),
            f"{row['perplexity']:,.4g}" if row.get("perplexity") is not None else "-",
            f"{statistics.median(read):,.0f}" if read else "-",
            f"{statistics.median(written):,.1f}" if written else "-",
            human_bytes(size) if size else "-", f"{row['bytes_per_token']:,.0f}" if "bytes_per_token" in row else "-",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                      for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]  # fmt: skip
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _percent(found: Mapping[str, Any] | None) -> str:
    mean, error = (None, None) if found is None else (found.get("mean"), found.get("standard_error"))
    if mean is None:
        return "-"
    return f"{100 * mean:.0f}" + (f"±{100 * error:.0f}" if error is not None and not math.isnan(error) else "")
