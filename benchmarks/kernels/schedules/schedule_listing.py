"""Read the TPU compiler's schedule of a kernel: how many bundles a step of its grid takes, by the way that it goes.

A TPU executes one bundle of instructions a cycle, in the order that the compiler wrote. The loop over a grid's steps is
one loop in the listing; what only some steps do (`pl.when`) are regions that a branch skips. So the cost of a step is
the bundles outside all regions plus those of the regions that it enters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:")
_NESTED = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:LH|LB|LE|PB|PF|CT)?\s*: (>*)")
_BRANCH = re.compile(r"sbr\.rel \((!?%p\w+)\) target = \$region(\d+)")
_LABEL = re.compile(r"(?:Start/End empty|End) region (\d+)\b")


class Region(NamedTuple):
    """Bundles `start` to `stop` - 1, which a branch may skip; `products` is how many matrix products it starts."""

    start: int
    stop: int
    products: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Loop(NamedTuple):
    """The loop over the grid: its bundles outside all regions, and the outermost regions in order."""

    always: int
    regions: Sequence[Region]

    @property
    def tiles(self) -> list[Region]:
        """Regions that multiply matrices."""
        return [region for region in self.regions if region.products]


def listings(folder: Path, kernel: str) -> list[Path]:
    """The files with the schedules of kernels whose names have `kernel` in them, where the compiler wrote them.

    It does so with `--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true` in `LIBTPU_INIT_ARGS`.
    """
    found = folder.glob(f"*{kernel}*-final_bundles.txt")
    return sorted(path for path in found if "schedule-analysis" not in path.name)


def read(listing: Path) -> Loop:
    """The loop of a kernel from its `final_bundles` listing.

    Raises:
      ValueError: the file has no loop.
    """
    start = stop = 0
    branches: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    products: list[int] = []
    for line in listing.read_text().splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        at = int(match.group(1), 16)
        products.extend([0] * (at + 1 - len(products)))
        products[at] = line.count("vmatmul")
        if match.group(2) in ("LB", "LH") and not start:
            start = at
        for label in _LABEL.findall(line):
            labels.setdefault(label, at)
        for _, target in _BRANCH.findall(line):
            branches.append((at, target))
            stop = at + 1
    if not start:
        raise ValueError(f"{listing}: no loop in it")
    pairs = [(at + 1, labels[target]) for at, target in branches if at >= start and labels.get(target, 0) > at + 1]
    # All that computes is one region, which the first steps skip while blocks are still on their way: not an option.
    body = {
        (low, high)
        for low, high in pairs
        if 2 * (high - low) > stop - start and any(low <= a and b < high for a, b in pairs if (a, b) != (low, high))
    }
    regions: list[Region] = []
    for low, high in sorted(set(pairs) - body):
        if not regions or low >= regions[-1].stop:
            regions.append(Region(low, high, sum(products[low:high])))
    return Loop(stop - start - sum(region.size for region in regions), regions)


def innermost(listing: Path) -> Loop:
    """The innermost loop that multiplies matrices: its bundles outside all regions, and the outermost regions in it.

    Raises:
      ValueError: no loop multiplies matrices.
    """
    depths: dict[int, int] = {}
    products: dict[int, int] = {}
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.read_text().splitlines():
        match = _NESTED.match(line)
        if match is None:
            continue
        at = int(match.group(1), 16)
        depths[at], products[at] = len(match.group(2)), line.count("vmatmul")
        for label in _LABEL.findall(line):
            labels.setdefault(label, at)
        branches += [(at, target) for _, target in _BRANCH.findall(line)]
    depth = max((depths[at] for at in depths if products[at]), default=0)
    if not depth:
        raise ValueError(f"{listing}: no loop with products in it")
    inside = [at for at in depths if depths[at] >= depth]
    start, stop = min(inside), max(inside) + 1
    pairs = {
        (at + 1, labels.get(target, 0)) for at, target in branches if start <= at and at + 1 < labels.get(target, 0)
    }
    body = {
        (low, high)
        for low, high in pairs
        if 2 * (high - low) > stop - start and any(low <= a and b < high for a, b in pairs if (a, b) != (low, high))
    }
    regions: list[Region] = []
    for low, high in sorted(pairs - body):
        if high <= stop and (not regions or low >= regions[-1].stop):
            regions.append(Region(low, high, sum(products.get(at, 0) for at in range(low, high))))
    return Loop(stop - start - sum(region.size for region in regions), regions)
