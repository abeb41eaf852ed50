"""One million tokens under every preset that has no end: does the process grow, and is the state what is described?

    python -m benchmarks.caches.a_million_by_preset                     # about an hour on 2 cores

A random model of one layer reads in processes of their own, as in `benchmarks.caches.million_tokens --tiny`. `grown` is
the resident memory of the process in the last quarter of the stream less that in the second, in kB: medians over
stretches of 8,192 tokens. `state` is what the stream holds, `described` what `sj.kv.describe` says of the cache before
anything is allocated, both in bytes. Left out are presets that a full cache ends, with one line that says so, and those
that are trained or measured for a model (a file). Presets are as they are by default, but that those of pages hold
8,192 tokens (`--capacity`): the oldest leave behind them.

An interrupted run goes on from --output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import streamjax as sj
from benchmarks.caches.million_tokens import quarters, run, tiny_model
from benchmarks.reporting import RESULTS, report

_NAME = "caches/a_million_by_preset"
_OF_MODELS = ("hsa", "cake", "prefix_kv", "zipvl")  # a model of its own, or sizes that are measured


def endless_presets() -> list[str]:
    """Those that need no file of heads or sizes, no model of their own, and that no token fills."""
    return [
        name
        for name, entry in sj.kv.presets().items()
        if not entry.needs and name not in _OF_MODELS and getattr(sj.kv.preset(name), "capacity", None) is None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", nargs="+", default=endless_presets(), help="presets with their options")
    parser.add_argument("--tokens", type=int, default=10**6)
    parser.add_argument("--capacity", type=int, default=8192, help="of presets of pages")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{_NAME}.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    model = tiny_model()
    for cache in arguments.caches:
        name, options = sj.kv.parse_preset(cache)
        if "capacity" in sj.kv.presets()[name].options:
            options.setdefault("capacity", arguments.capacity)
        spec = f"{name}:{','.join(f'{key}={value}' for key, value in options.items())}" if options else name
        if spec in [row["cache"] for row in rows]:
            continue
        figures = run(spec, arguments.tokens, tiny=True)
        _, second, _, last = quarters(figures["resident"])
        rows.append(
            {
                "cache": spec,
                "tokens": f"{figures['tokens']:,}",
                "tokens/s": f"{figures['tokens'] / figures['seconds']:,.0f}",
                "state": f"{figures['cache_bytes']:,}",
                "described": f"{sj.kv.describe(sj.kv.preset(name, **options), model).total:,}",
                "grown, kB": f"{(last - second) / 1e3:.0f}",
                "arrays": f"{figures['arrays'][0]} to {figures['arrays'][-1]}",
            }
        )
        report(_NAME, rows, arguments.output)


if __name__ == "__main__":
    main()
