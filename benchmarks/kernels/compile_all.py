"""Compile every kernel for chips that are not there, at the shapes of known models, by the chips' own compilers.

    python -m benchmarks.kernels.compile_all           # all of them, or those whose kernels have changed since
    python -m benchmarks.kernels.compile_all --chips v5e --models gemma-3-4b --patterns decode paged
    python -m benchmarks.kernels.compile_all --chips h100 --patterns hopper-full hopper-local hopper-sinks hopper-capped
    python -m benchmarks.kernels.compile_all --page    # write the tables into docs/kernels.md, compile nothing

A kernel that asks for a layout, an alignment or an amount of fast memory that a chip does not have is refused here.
Every result is written at once, and a run goes on from those that are there: what still is the same program for the
same compilers is not compiled again. One takes a second to a minute on one core; with --spills, which asks a TPU's
compiler how many registers it spilled, some take minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import aot, tables
from benchmarks.kernels.compile_case import CACHES, CHIPS, HOPPER, PATTERNS, TPU_ONLY, Case, compile_case, source
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import RESULTS, machine, table

OUTPUT = RESULTS / "kernels/compile_all.json"
PAGE = aot.ROOT / "docs" / "kernels.md"
ORDER = (*CACHES, *TPU_ONLY, "hsa", *(pattern for pattern in PATTERNS if pattern != "hsa"))


def twins(model: str) -> list[str]:
    """Models whose attention has the same shapes: one is compiled for all, the first."""

    def shape(name: str) -> tuple[int, ...]:
        return SHAPES[name].num_heads, SHAPES[name].num_kv_heads, SHAPES[name].head_dim

    return [name for name in sorted(SHAPES) if shape(name) == shape(model)]


def update(case: Case, old: Mapping[str, Any], force: bool = False, spills: bool = False) -> dict[str, Any]:
    """A case's figures, or `refused`, the compiler's line; those that are there if nothing has changed."""
    now = source(case.chip)
    if old.get("source") == now and not force:
        return dict(old)
    try:
        found = compile_case(case, None if force else old.get("program"), spills)
    except RuntimeError as error:
        return {"refused": str(error).removeprefix(f"{case}: "), "source": now}
    return {**(found if "kernels" in found else old), "source": now}


def described(figures: Mapping[str, Any]) -> str:
    """One case in a line."""
    if "refused" in figures:
        return f"refused: {figures['refused']}"
    parts = [f"{figures['seconds']} s", f"{figures['temp'] / 1e6:.1f} MB of temporaries"]
    return "; ".join(parts + [f"{name} {found}" for name, found in figures["kernels"].items()])


def temporaries(chip: str, figures: Mapping[str, Any]) -> dict[str, str]:
    """What the table of temporaries says of a case."""
    return {"temp": "refused" if "refused" in figures else f"{figures['temp'] / 1e6:,.1f}"}


def loops(chip: str, figures: Mapping[str, Any]) -> dict[str, str]:
    """What the table of inner loops says of a case, by the name of the kernel."""
    kernels = figures.get("kernels", {})
    return {name: " / ".join(map(str, x["loop"].values())) for name, x in kernels.items() if "loop" in x}


def cells(chip: str, figures: Mapping[str, Any]) -> dict[str, str]:
    """What the tables of kernels say of a case, by the name of the kernel."""
    found = {}
    for name, kernel in figures.get("kernels", {}).items():
        if chip == "h100":
            values = [kernel.get("registers"), kernel.get("spills"), kernel.get("shared")]
            values[2] = None if values[2] is None else round(values[2] / 1024)
            found[name] = " / ".join("?" if value is None else str(value) for value in values)
        else:
            spills = f" ({kernel['vmem_spills'] / 2**20:.2f})" if kernel.get("vmem_spills") else ""
            found[name] = f"{kernel['vmem'] / 2**20:.2f}{spills}"
    return found


def grouped(
    found: Mapping[str, Any], chips: list[str], cells: Callable[[str, Mapping[str, Any]], dict[str, str]]
) -> list[dict[str, str]]:
    """Lines of a table with a column a model; chips, then cases, whose lines are the same share one."""
    models = list(dict.fromkeys(twins(model)[0] for model in SHAPES))
    said: dict[tuple[str, str, str], dict[str, str]] = {}  # kernel, case, chip: a cell for each model
    for key, figures in found.items():
        chip, model, pattern, _ = key.split("/")
        for kernel, cell in cells(chip, figures).items() if chip in chips else []:
            said.setdefault((kernel, pattern, chip), dict.fromkeys(models, "-"))[model] = cell
    by_chips: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for kernel, pattern, chip in sorted(said, key=lambda at: (_place(at[0], at[1]), list(CHIPS).index(at[2]))):
        by_chips.setdefault((kernel, pattern, tuple(said[kernel, pattern, chip].values())), []).append(chip)
    by_cases: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (kernel, pattern, values), named in by_chips.items():
        by_cases.setdefault((kernel, ", ".join(named), values), []).append(pattern)
    lines = []
    for (kernel, named, values), patterns in by_cases.items():
        line = {"chips": named} if len(chips) > 1 else {}
        line |= {} if kernel == "temp" else {"kernel": f"`{kernel}`"}
        line["cases"] = ", ".join(patterns)
        lines.append(line | {", ".join(twins(model)): cell for model, cell in zip(models, values, strict=True)})
    return lines


def _place(kernel: str, pattern: str) -> tuple[int, str, int]:
    """Where a kernel's line stands: flash attention, hierarchical, caches, losses; forwards first."""
    families = ("temp", "flash", "hsa", "decode", "paged", "pool", "shared_pool", "page_scores", "token")
    family = next(place for place, name in enumerate(families) if kernel.startswith(name))
    backward = "0" if kernel.endswith("forward") else kernel
    return family, backward, [*PATTERNS, *CACHES, *TPU_ONLY, *HOPPER].index(pattern)


def tried(chip: str, pattern: str) -> bool:
    """Whether there is a kernel for the chip."""
    return pattern not in (TPU_ONLY if chip == "h100" else HOPPER)


def page(found: Mapping[str, Any]) -> str:
    """The tables of docs/kernels.md, and the refusals word by word."""
    models = dict.fromkeys(twins(model)[0] for model in SHAPES)
    keys = {f"{c}/{model}/{pattern}" for c in CHIPS for model in models for pattern in ORDER if tried(c, pattern)}
    missing = len(keys - {key.rpartition("/")[0] for key in found})
    refused = [key for key, figures in found.items() if "refused" in figures]
    parts = [f"{len(found) - len(refused)} programs compiled, {len(refused)} refused, {missing} not tried yet."]
    parts += [f"- `{key}`: {found[key]['refused']}" for key in refused]
    tpus = [chip for chip in CHIPS if chip != "h100"]
    for title, lines in {
        "Temporaries of the whole program, MB": grouped(found, list(CHIPS), temporaries),
        "VMEM of a TPU's kernels, MiB; where --spills asked, spilled registers in brackets": grouped(
            found, tpus, cells
        ),
        "An H100's kernels: registers / bytes spilled / KiB of shared memory": grouped(found, ["h100"], cells),
        "An H100's inner loops, one pass of a warp over a block: instructions / cycles of the tensor cores / cycles of "
        "exponentials": grouped(found, ["h100"], loops),
    }.items():
        parts += [f"{title}:\n\n{table(lines)}"] if lines else []
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--patterns", nargs="+", choices=ORDER + HOPPER, default=list(ORDER))
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--force", action="store_true", help="compile also what has not changed")
    parser.add_argument("--spills", action="store_true", help="of TPU kernels too: ten times as long")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/kernels.md, compile nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    found = json.loads(arguments.output.read_text())["cases"] if arguments.output.exists() else {}
    if arguments.page:
        tables.put(PAGE, "kernels/compile_all", page(found))
        return
    models = list(dict.fromkeys(twins(model)[0] for model in arguments.models))
    wanted = [
        Case(c, m, p, arguments.length)
        for p in arguments.patterns
        for m in models
        for c in arguments.chips
        if tried(c, p)
    ]
    for number, case in enumerate(wanted, 1):
        old = found.get(str(case), {})
        found[str(case)] = update(case, old, arguments.force, arguments.spills)
        if found[str(case)] != old:
            body = {"benchmark": "kernels/compile_all", "machine": machine(), "cases": dict(sorted(found.items()))}
            beside = arguments.output.with_suffix(".partial")
            beside.write_text(json.dumps(body, indent=1) + "\n")
            beside.replace(arguments.output)
        print(f"{number} of {len(wanted)}: {case}: {described(found[str(case)])}", flush=True)
    print(page(found))
    if refused := sum("refused" in found[str(case)] for case in wanted):
        sys.exit(f"{refused} refused")


if __name__ == "__main__":
    main()
