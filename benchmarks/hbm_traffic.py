"""Bytes that a compiled TPU program moves between a chip's main memory and the rest of it, read off its text.

The compiler's own count, `cost_analysis()["bytes accessed"]`, adds up what every instruction reads and writes, wherever
that lies. A weight that is fetched into fast memory (`S(1)`) and multiplied there counts three times. Here main memory
alone counts: what an instruction reads from it, a slice as much as the slice has, and what it writes to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "f64": 64, "s64": 64, "u64": 64}  # others end in their number of bits
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "after-all", "partition-id"}
_SAME = {"bitcast", "copy", "fusion", "reshape", "transpose", "convert"}  # inside a fusion: the operand, looked at anew
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and where their operands have the new part
_CALLS = {"while": "body", "call": "to_apply"}


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of its result, all parts of a tuple together, wherever they lie."""
        return sum(_size(*array) for array in _ARRAY.findall(self.shape))

    @property
    def bytes_in_main_memory(self) -> int:
        return sum(_size(*array) for array in _ARRAY.findall(self.shape) if "S(" not in array[2])


def _size(kind: str, shape: str, _: str) -> int:
    bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind))
    return math.ceil(bits * math.prod(int(width) for width in shape.split(",") if width) / 8)


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The instructions of each computation by name, and the name of the program's own."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            if head := re.match(r"(ENTRY )?(%[\w.\-]+) \(", line):
                inside = head.group(2)
                found[inside] = {}
                entry = inside if head.group(1) else entry
        elif match := _LINE.match(line):
            root, name, shape, operation, rest = match.groups()
            operands = re.findall(r"%[\w.\-]+", rest.split("), ")[0])
            found[inside][name] = Instruction(name, shape, operation, tuple(operands), rest, root is not None)
    return found, entry


def moved_bytes(text: str, turns: int = 1) -> int:
    """Bytes that one run of a compiled program reads from main memory, and writes to it.

    A loop's body counts `turns` times. A slice inside of a fusion reads as many bytes as it has; what else a fusion
    reads, it reads whole.
    """
    found, entry = computations(text)
    return sum(_moved(found, entry, turns))


def _moved(computations: dict[str, dict[str, Instruction]], name: str, turns: int = 1) -> Iterator[int]:
    instructions = computations[name]
    for one in instructions.values():
        if one.operation in _NOTHING or one.operation.endswith(("-done", "-update")):
            continue
        if one.operation in _CALLS:
            called = re.search(_CALLS[one.operation] + r"=(%[\w.\-]+)", one.rest)
            times = turns if one.operation == "while" else 1
            yield from (times * size for size in _moved(computations, called.group(1), turns)) if called else ()
        elif one.operation.endswith("-start"):  # a tuple of source and target: each side moves as much as the smaller
            sides = _ARRAY.findall(one.shape)[:2]
            yield min(_size(*side) for side in sides) * sum("S(" not in side[2] for side in sides)
        else:
            yield one.bytes_in_main_memory
            called = re.search(r"calls=(%[\w.\-]+)", one.rest)
            for place, operand in enumerate(one.operands):
                source = instructions.get(operand)
                if source is None or not source.bytes_in_main_memory:
                    continue
                if one.operation in _SLICES:
                    yield min(one.bytes, source.bytes) if place == 0 else source.bytes
                elif one.operation == "fusion" and called:
                    yield min(source.bytes, _read(computations, called.group(1), place, source.bytes))
                else:
                    yield source.bytes


def _read(computations: dict[str, dict[str, Instruction]], fusion: str, place: int, whole: int) -> int:
    """Bytes of its operand at a place that a fusion reads, or a fusion inside of it."""
    fused = computations[fusion]
    start = next(one for one in fused.values() if one.operation == "parameter" and one.rest.startswith(f"{place})"))
    total, waiting, seen = 0, [start.name], set()
    while waiting:
        name = waiting.pop()
        for one in fused.values():
            if name not in one.operands or one.name in seen:
                continue
            seen.add(one.name)
            inner = re.search(r"calls=(%[\w.\-]+)", one.rest) if one.operation == "fusion" else None
            part = _read(computations, inner.group(1), one.operands.index(name), whole) if inner else whole
            if part < whole:
                total += part
            elif one.operation in _SLICES and one.operands[0] == name:
                total += one.bytes
            elif one.operation in _SAME and not one.root:
                waiting.append(one.name)
            else:
                return whole
    return total


def updated_in_place(text: str) -> int:
    """Bytes that `moved_bytes` counts as read and written, of buffers of which scatters and updates change a part.

    They lie where they lay before (`input_output_alias`), and what is written is as large as the update.
    """
    found, entry = computations(text)
    total = 0
    for one in found[entry].values():
        called = re.search(r"calls=(%[\w.\-]+)", one.rest) if one.operation == "fusion" else None
        inside = found[called.group(1)] if called else found[entry]
        change = next((other for other in inside.values() if other.root), None) if called else one
        if change is not None and change.operation in _UPDATES:
            update = inside.get(change.operands[_UPDATES[change.operation]])
            total += 2 * max(0, one.bytes_in_main_memory - (update.bytes if update else 0))
    return total
