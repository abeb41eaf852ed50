"""Memory of one gradient step by what backprop keeps, compiled ahead of time for one v5p, v6e and H100.

    python -m benchmarks.backprop.memory                              # everything; hours on 2 cores
    python -m benchmarks.backprop.memory --models qwen3-8b --chips v5p --methods full-logits remat
    python -m benchmarks.backprop.memory --page                       # compile nothing, rewrite docs/long_context.md

One sequence, bf16 parameters and gradients, layers stacked; every figure is the compiler's. Peak memory is arguments
(weights, tokens) + outputs (gradients) - aliases + temporaries. Bytes per token are the slope of the peak between the
two longest of the lengths that fit (256K, too, where the line says that half of it does); where fewer than two fit,
between lengths that the compiler refused, for which it says what they need ("~"). The longest sequence comes from that
line and is then compiled: it is the longest that was seen to fit.

The baselines are gradient checkpointing a layer (each layer's input is kept, attention is blockwise): `full-logits`
with the logits of the whole sequence, once in float32, and `remat` with the cross-entropy in chunks. `layer` and
`chunk` are the orders of `sj.training.loss_and_grad`, in chunks of 2,048 tokens; `layer-segment` keeps every sixth
layer's input and computes those between again, `layer-host` keeps all of them in the host's memory; `chunk` sums
gradients in bf16, of parameters and of keys and values.
Each case is written to benchmarks/results/backprop/memory.json at once, and not compiled again while it lowers to the
same program.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import aot, tables
from benchmarks.backprop.compile_case import FULL_LOGITS, Case, compile_case, source
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import RESULTS, machine, table

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "h100": "h100"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "full-logits": FULL_LOGITS,
    "remat": {"method": "remat"},
    "layer": {"method": "layer", "chunk_size": 2048},
    "layer-segment": {"method": "layer", "chunk_size": 2048, "segment": 6},
    "layer-host": {"method": "layer", "chunk_size": 2048, "offload": "host"},
    "chunk": {"method": "chunk", "chunk_size": 2048, "grad_dtype": "bfloat16", "kv_grad_dtype": "bfloat16"},
}
LENGTHS = (16384, 32768, 65536)
FAR = 262144  # for methods that grow so slowly that at the other lengths something else than the sequence sets the peak
HOST_BYTES = 120 * 2**30  # of the host's memory; the compilers for TPUs refuse what needs more than 128 GiB of it
STEP = 1024  # the longest sequence is a multiple of it
PAGE = Path(__file__).parents[2] / "docs" / "long_context.md"

Figures = Mapping[str, Any]


class Line(NamedTuple):
    """Peak memory as `fixed + slope * tokens` bytes, between two lengths; `exact` unless the compiler refused one."""

    fixed: float
    slope: float
    between: tuple[int, int]
    exact: bool

    def longest(self, memory_bytes: int) -> int:
        """The longest sequence that `memory_bytes` hold by this line, rounded down to a multiple of `STEP`."""
        return max(0, math.floor((memory_bytes - self.fixed) / self.slope / STEP) * STEP)


def fit_line(peaks: Mapping[int, Figures]) -> Line | None:
    """The line through the two longest lengths that fit, or else through the outer ones; None for one length."""
    fitting = [length for length in sorted(peaks) if peaks[length]["fits"]]
    exact = len(fitting) > 1
    lengths = fitting if exact else sorted(peaks)
    if len(lengths) < 2:
        return None
    low, high = lengths[-2 if exact else 0], lengths[-1]
    slope = max((peaks[high]["peak"] - peaks[low]["peak"]) / (high - low), 4.0)  # a token and more is always there
    return Line(peaks[low]["peak"] - slope * low, slope, (low, high), exact or "temp" in peaks[high])


def find_longest(
    figures: Callable[[int], Figures], line: Line, peaks: Mapping[int, Figures], memory_bytes: int, attempts: int = 2
) -> int:
    """The longest sequence that was compiled and fits, to 3% or `attempts` more compiles; 0 where nothing fits.

    The first attempt is where the line meets the memory, or where the host's is full. After it, halfway between the
    longest that fits and the shortest that does not, or by the line beyond the longest while nothing was refused.
    """
    best = max((length for length in peaks if peaks[length]["fits"]), default=0)
    refused = min((length for length in peaks if not peaks[length]["fits"]), default=None)
    on_host = peaks[best].get("host_temp", 0) if best else 0
    limit = HOST_BYTES * best // on_host // STEP * STEP if on_host else math.inf
    length = min(line.longest(memory_bytes), limit)
    for _ in range(attempts):
        if not (refused is None or best < length < refused):
            length = (best + refused) // 2 // STEP * STEP
        if length - best < max(STEP, 0.03 * best):
            break
        found = figures(length)
        if found["fits"]:
            best = length
            length = min(length + math.floor((memory_bytes - found["peak"]) / line.slope / STEP) * STEP, limit)
        else:
            refused = length
    return best


class Store:
    """Results on disk: figures by `model/chip/method/length`, and the longest sequence by `model/chip/method`."""

    def __init__(self, path: Path):
        self.path = path
        saved = json.loads(path.read_text()) if path.exists() else {}
        self.cases: dict[str, dict[str, Any]] = saved.get("cases", {})
        self.longest: dict[str, int] = saved.get("longest", {})

    def of(self, series: str) -> dict[int, Figures]:
        """Figures of `model/chip/method` by length."""
        found = {key.rpartition("/"): figures for key, figures in self.cases.items()}
        return {int(length): figures for (name, _, length), figures in found.items() if name == series}

    def compile(self, series: str, length: int, force: bool = False) -> Figures:
        """Figures of one length: from the store where the program is the same, else compiled, stored and reported."""
        key, (model, chip, method) = f"{series}/{length}", series.split("/")
        old = self.cases.get(key, {})
        if old.get("source") == source() and not force:
            return old
        case = Case(SHAPES[model], CHIPS[chip], length, METHODS[method])
        found = compile_case(case, None if force else old.get("program"))
        same = "peak" not in found
        self.cases[key] = {**(old if same else found), "source": source()}
        self.save()
        print(f"{key}: {'as before' if same else describe(self.cases[key])}", flush=True)
        return self.cases[key]

    def save(self) -> None:
        """Write everything, through a file beside it, so that an interrupted run leaves what it had."""
        body = {
            "benchmark": "backprop/memory",
            "machine": machine(),
            "arguments": METHODS,
            "cases": dict(sorted(self.cases.items())),
            "longest": dict(sorted(self.longest.items())),
            "rows": rows(self),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(body, indent=1) + "\n")
        beside.replace(self.path)


def describe(figures: Figures) -> str:
    """One case in words."""
    size = f"{figures['peak'] / 1e9:.2f} GB" + ("" if "temp" in figures else " needed")
    host = sum(value for key, value in figures.items() if key.startswith("host_"))
    size += f" + {host / 1e9:.2f} GB of host memory" if host else ""
    return f"{size}{'' if figures['fits'] else ', does not fit'} ({figures['compile_s']:.0f} s)"


def rows(store: Store) -> list[dict[str, str]]:
    """A line of the table for every model, chip and method."""
    lines = {}
    for model in SHAPES:
        for chip in CHIPS:
            for method in METHODS:
                found = store.of(f"{model}/{chip}/{method}")
                line = fit_line({length: found[length] for length in (*LENGTHS, FAR) if length in found})
                if line is not None:
                    lines[model, chip, method] = line
    return [_row(store, lines, *key) for key in lines]


def _row(
    store: Store, lines: Mapping[tuple[str, str, str], Line], model: str, chip: str, method: str
) -> dict[str, str]:
    line, series = lines[model, chip, method], f"{model}/{chip}/{method}"
    found = store.of(series)

    def ratio(baseline: str) -> str:
        base = lines.get((model, chip, baseline))
        return "-" if base is None else f"{base.slope / line.slope:.1f}"

    def peak(length: int) -> str:
        if length not in found:
            return "-"
        size = f"{found[length]['peak'] / 1e9:.1f}"
        return size if found[length]["fits"] else f"({size})"

    longest = store.longest.get(series)
    low, high = line.between
    return {
        "model": model,
        "chip": chip,
        "method": method,
        "KB a token": f"{'' if line.exact else '~'}{line.slope / 1e3:.1f}",
        "between": f"{low // 1024}K-{high // 1024}K",
        "x full-logits": ratio("full-logits"),
        "x remat": ratio("remat"),
        "fixed GB": f"{line.fixed / 1e9:.1f}",
        **{f"GB at {length // 1024}K": peak(length) for length in LENGTHS},
        "longest": "-" if longest is None else f"{longest:,}" if longest else "none",
    }


def page_table(rows: list[dict[str, str]]) -> str:
    """The tables of docs/long_context.md: one a model, a line a method, three columns a chip."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = {(row["method"], row["chip"]): row for row in rows if row["model"] == model}
        body: list[dict[str, str]] = []
        for method in dict.fromkeys(method for method, _ in mine):
            cells = {"method": f"`{method}`"}
            for chip in CHIPS:
                row = mine.get((method, chip), {})
                cells[f"{chip}: KB a token"] = row.get("KB a token", "-")
                cells[f"{chip}: x full-logits"] = row.get("x full-logits", "-")
                cells[f"{chip}: longest"] = row.get("longest", "-")
            body.append(cells)
        parts.append(f"**{model}**\n\n{table(body)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens; the table shows 16K, 32K, 64K")
    parser.add_argument("--no-longest", action="store_true", help="do not look for the longest sequence that fits")
    parser.add_argument("--force", action="store_true", help="compile also what lowers to the same program as before")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/long_context.md")
    parser.add_argument("--output", type=Path, default=RESULTS / "backprop/memory.json")
    arguments = parser.parse_args()
    store = Store(arguments.output)
    if arguments.page:
        tables.put(PAGE, "backprop/memory", page_table(rows(store)))
        return
    every = [(m, c, k) for m in arguments.models for c in arguments.chips for k in arguments.methods]
    for model, chip, method in every:
        series = f"{model}/{chip}/{method}"
        found = {length: store.compile(series, length, arguments.force) for length in arguments.lengths}
        line, memory = fit_line(found), aot.TOPOLOGIES[CHIPS[chip]].memory_bytes
        if line is not None and line.longest(memory) > FAR // 2:
            found[FAR] = store.compile(series, FAR, arguments.force)
            line = fit_line(found)
        if line is not None and not arguments.no_longest:
            store.longest[series] = find_longest(partial(store.compile, series), line, found, memory)
            store.save()
            print(f"{series}: {line.slope / 1e3:.1f} KB a token, longest {store.longest[series]:,}", flush=True)
    print(table(rows(store)))
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
