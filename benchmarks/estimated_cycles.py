"""What the TPU compiler expects a program to take, in cycles, read off its compiled text.

The compiler writes `estimated_cycles` beside most instructions that compute: fusions, copies, reductions. A loop counts
as often as it turns, which its condition tells: a counter is compared with a number that stands in the program or
comes in with the loop's operands. Of a conditional's branches the one that takes longest counts.

Not in it: kernels (`tpu_custom_call`), which have no estimate and are counted by name instead; copies that run beside
computation (`copy-start`), and waiting for them; and the few instructions without an estimate, counted by their kind.
A v5p compiles for both cores of its chip at once: its cycles are those of the chip.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.hbm_traffic import Instruction, computations

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "copy-start",
    "copy-done", "slice-start", "slice-done", "opt-barrier", "custom-call",
}  # fmt: skip
_SAME = {"copy", "bitcast", "convert", "reshape", "opt-barrier"}  # of a scalar
_Numbers = Mapping[int, int]  # what is known of the parts of a computation's parameter, a tuple


class Estimate(NamedTuple):
    """One run of a program: cycles, how often it runs each kernel, and what it runs that has no estimate, by kind."""

    cycles: int
    kernels: Counter[str]
    without: Counter[str]

    def times(self, count: int) -> Estimate:
        many = (Counter({key: count * size for key, size in found.items()}) for found in self[1:])
        return Estimate(count * self.cycles, *many)


def estimate(text: str, turns: int | None = None) -> Estimate:
    """Read a compiled program (`compiled.as_text()`).

    Args:
      text: of the program.
      turns: of loops that turn as often as the data say.

    Raises:
      ValueError: there is such a loop, and no `turns`.
    """
    found, entry = computations(text)
    return _Reader(found, turns).run(entry, {})


class _Reader:
    def __init__(self, found: Mapping[str, Mapping[str, Instruction]], turns: int | None):
        self.found, self.turns = found, turns

    def run(self, name: str, numbers: _Numbers) -> Estimate:
        """One run of a computation, of whose parameter some `numbers` are known."""
        cycles, kernels, without = 0, Counter[str](), Counter[str]()
        for one in self.found[name].values():
            inner = self.called(name, one, numbers)
            if inner is not None:
                cycles += inner.cycles
                kernels += inner.kernels
                without += inner.without
            elif match := _ESTIMATE.search(one.rest):
                cycles += int(match.group(1))
            elif 'custom_call_target="tpu_custom_call"' in one.rest:
                kernels[re.sub(r"[.\d]+$", "", one.name.lstrip("%"))] += 1
            elif one.operation == "fusion" or (_elements(one) > 1 and one.operation not in _FREE):
                without[one.operation] += 1
        return Estimate(cycles, kernels, without)

    def called(self, name: str, one: Instruction, numbers: _Numbers) -> Estimate | None:
        """What an instruction runs that runs other computations."""
        if one.operation == "while":
            body, condition = (re.search(rf"\b{word}=(%[\w.\-]+)", one.rest)[1] for word in ("body", "condition"))  # type: ignore[index]
            entering = self.parts(name, one.operands[0], numbers)
            kept = {place: value for place, value in entering.items() if self.is_kept(body, place)}
            count = self.count(body, condition, entering, kept)
            return self.run(body, kept).times(count)
        if one.operation == "conditional":
            names = re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", one.rest)
            if listed := re.search(r"branch_computations=\{([^}]*)\}", one.rest):
                names = re.findall(r"%[\w.\-]+", listed[1])
            return max((self.run(branch, {}) for branch in names), key=lambda found: found.cycles)
        if one.operation == "call" and (target := re.search(r"to_apply=(%[\w.\-]+)", one.rest)):
            return self.run(target[1], {})
        return None

    def count(self, body: str, condition: str, entering: _Numbers, kept: _Numbers) -> int:
        """How often a loop turns: from its counter's start to the bound, by its step."""
        found = self.comparison(condition)
        if found is not None:
            place, direction, bound = found
            limit = bound if isinstance(bound, int) else kept.get(bound[0])
            start, step = entering.get(place), self.step(body, place, kept)
            if None not in (limit, start, step):
                distance = (limit - start) * (1 if step > 0 else -1)  # type: ignore[operator]
                whole = distance + (1 if direction in ("LE", "GE") else 0)
                if direction in (("LT", "LE", "NE") if step > 0 else ("GT", "GE", "NE")):  # type: ignore[operator]
                    return max(0, math.ceil(whole / abs(step)))  # type: ignore[arg-type]
        if self.turns is None:
            raise ValueError(f"loop {body} turns as often as the data say: pass turns")
        return self.turns

    def comparison(self, name: str) -> tuple[int, str, int | tuple[int]] | None:
        """Of a loop's condition: its counter's place, the direction, and the bound, a number or (its place,)."""
        root = next(one for one in self.found[name].values() if one.root)
        outer, sides = name, root.operands
        if root.operation == "fusion" and (inner := re.search(r"calls=(%[\w.\-]+)", root.rest)):
            name = inner[1]
            root = next(one for one in self.found[name].values() if one.root)
            places = {one.name: int(one.rest.split(")")[0]) for one in self.found[name].values()
                      if one.operation == "parameter"}  # fmt: skip
            handed = {parameter: sides[place] for parameter, place in places.items()}
        else:
            handed = {}
        direction = re.search(r"direction=(\w+)", root.rest)
        if root.operation != "compare" or direction is None:
            return None
        ends = []
        for side in root.operands:
            inside = name if side not in handed else outer
            ends.append(self.source(inside, handed.get(side, side)))
        match ends, direction[1]:
            case [(place, None), (bound, None)], way if place is not None:
                return place, way, (bound,)
            case [(place, None), (None, number)], way if place is not None:
                return place, way, number
            case [(None, number), (place, None)], way if place is not None:
                return place, {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(way, way), number
        return None

    def source(self, name: str, value: str) -> tuple[int | None, int | None]:
        """Where a scalar comes from: the place in the parameter's tuple, or a number; neither is known of others."""
        one = self.found[name].get(value)
        while one is not None and one.operation in _SAME:
            one = self.found[name].get(one.operands[0])
        if one is not None and one.operation == "constant" and (number := re.match(r"(-?\d+)\)", one.rest)):
            return None, int(number[1])
        if one is not None and one.operation == "get-tuple-element":
            held = self.found[name].get(one.operands[0])
            place = int(re.search(r"index=(\d+)", one.rest)[1])  # type: ignore[index]
            if held is not None and held.operation == "parameter":
                return place, None
            if held is not None and held.operation == "tuple":
                return self.source(name, held.operands[place])
        return None, None

    def parts(self, name: str, value: str, numbers: _Numbers) -> dict[int, int]:
        """The numbers among the parts of a tuple."""
        one, found = self.found[name][value], {}
        for place, part in enumerate(one.operands if one.operation == "tuple" else ()):
            held, number = self.source(name, part)
            number = numbers.get(held) if held is not None else number
            if number is not None:
                found[place] = number
        return found

    def is_kept(self, body: str, place: int) -> bool:
        """Whether a loop hands a part of its tuple on as it is."""
        root = next(one for one in self.found[body].values() if one.root)
        return root.operation == "tuple" and self.source(body, root.operands[place]) == (place, None)

    def step(self, body: str, place: int, kept: _Numbers) -> int | None:
        """What a turn adds to the counter."""
        root = next(one for one in self.found[body].values() if one.root)
        added = self.found[body].get(root.operands[place]) if root.operation == "tuple" else None
        while added is not None and added.operation in _SAME:
            added = self.found[body].get(added.operands[0])
        if added is None or added.operation not in ("add", "subtract"):
            return None
        held = [self.source(body, side) for side in added.operands]
        known = [number if at is None else kept.get(at) for at, number in held]
        sign = -1 if added.operation == "subtract" else 1
        if held[0] == (place, None) and known[1]:
            return sign * known[1]
        return known[0] if held[1] == (place, None) and sign > 0 and known[0] else None


def _elements(one: Instruction) -> int:
    """Of the largest part of what an instruction makes."""
    shapes = re.findall(r"\w\[([\d,]*)\]", one.shape)
    return max((math.prod(int(width) for width in shape.split(",") if width) for shape in shapes), default=0)
