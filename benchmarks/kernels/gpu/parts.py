"""What the parts of `all_kernels` share: how wrong a result is, how long a call takes, a line a side."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
SPREAD = 2**28  # bytes of all sets of inputs that take turns, more than any cache holds
QUEUED_S, MOST_CALLS = 4e-3, 50  # work between two synchronisations, and calls at most
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A side that is not JAX: `call` launches, `prepare` makes its inputs of arrays, once; `wait` until all is done."""

    call: Callable[..., Any]
    prepare: Callable[[Sequence[jax.Array]], Sequence[Any]]
    wait: Callable[[], None]


Programs = Mapping[str, Callable[..., Any] | Foreign]


class Part(Protocol):
    """A module about some of the kernels."""

    @property
    def NAMES(self) -> Sequence[str]:
        """What it checks and times."""

    @property
    def KERNELS(self) -> Sequence[str]:
        """The `implementation`s of it."""

    def errors(self, model: str, name: str, kernel: str, dtype: Any) -> float:
        """Largest relative error of all results against float64, on this device."""

    def measure(self, model: str, name: str, length: int, kernels: Sequence[str], device: Device) -> list[Line]:
        """A line a side, of which `kernels` are ours."""


def exact(tree: Any) -> Any:
    """Floating numbers in float64, all else as it is; inside of `jax.enable_x64`."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64) if _floats(x) else x), tree)


def _floats(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def worst(found: Any, right: Any) -> float:
    """Largest error of any array, relative to the largest finite number of it; infinite for NaN or another infinity."""
    each = []
    for mine, expected in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        mine, expected = np.asarray(mine, np.float64), np.asarray(expected, np.float64)
        finite = np.isfinite(expected)
        if mine.shape != expected.shape or not np.array_equal(mine[~finite], expected[~finite]):
            return math.inf
        largest = np.max(np.abs(expected[finite]), initial=0.0)
        error = np.max(np.abs(mine[finite] - expected[finite]), initial=0.0) / (largest or 1.0)
        each.append(float(error) if np.isfinite(error) else math.inf)
    return max(each)


def copies(inputs: Callable[[int], Any]) -> list[Any]:
    """Sets of inputs by seed, that take turns so that no call finds its own in a cache."""
    sets = [inputs(0)]
    size = sum(x.nbytes for x in jax.tree.leaves(sets[0]))
    return sets + [inputs(seed) for seed in range(1, max(3, math.ceil(SPREAD / size)))]


def seconds(programs: Programs, sets: Sequence[Sequence[Any]], repeats: int) -> dict[str, float]:
    """Median seconds of a call of each program, in turn; one that cannot run is named and left out.

    Calls are queued behind each other between two synchronisations, as many as keep the device busy, so that neither
    the synchronisation nor, for programs that take longer than it, the launch of a call is counted.
    """
    sides, counts = {}, {}
    for name, program in programs.items():
        try:
            side = _Side(program, sets)
            side.clock(0, 1)
        except Exception as error:
            print(f"{name} cannot run this: {first_line(error)}", flush=True)
            continue
        sides[name] = side
        counts[name] = min(max(math.ceil(QUEUED_S / side.clock(0, 1)), 1), MOST_CALLS)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, side in sides.items():
            times[name].append(side.clock(turn * counts[name], counts[name]) / counts[name])
    return {name: statistics.median(each) for name, each in times.items()}


def first_line(error: Exception) -> str:
    """What is said of an error: a compiler's can have thousands of lines."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


class _Side:
    def __init__(self, program: Callable[..., Any] | Foreign, sets: Sequence[Sequence[Any]]):
        if isinstance(program, Foreign):
            self.call, self.sets = program.call, [program.prepare(x) for x in sets]
            self.wait = lambda _: program.wait()
        else:
            self.call, self.sets, self.wait = jax.jit(program), sets, jax.block_until_ready

    def clock(self, first: int, count: int) -> float:
        """Seconds of `count` calls from the set `first` on."""
        start = time.perf_counter()
        for turn in range(first, first + count):
            found = self.call(*self.sets[turn % len(self.sets)])
        self.wait(found)
        return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Device:
    """A device by its own ceilings, `TFLOP/s` and `GB/s`, on which each side is timed `repeats` times."""

    ceilings: Mapping[str, float]
    repeats: int

    @classmethod
    def measured(cls, repeats: int) -> Device:
        """Ceilings of this device: a large bfloat16 product, and a large copy (read and written).

        `launch us` is what a call takes that does next to nothing: less than it cannot be measured.
        """
        size = 8192
        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
        x = jax.random.normal(jax.random.key(2), 2**29, jnp.bfloat16)
        product = seconds({"product": jnp.matmul}, [(a, b)], max(repeats, 10))["product"]
        copy = seconds({"copy": lambda x: x + 1}, [(x,)], max(repeats, 10))["copy"]
        launch = seconds({"launch": lambda x: x + 1}, [(x[:128],)], max(repeats, 10))["launch"]
        found = {"TFLOP/s": 2 * size**3 / product / 1e12, "GB/s": 2 * x.nbytes / copy / 1e9, "launch us": launch * 1e6}
        return cls(found, repeats)

    def lines(self, programs: Programs, sets: Sequence[Any], unit: str, amount: float, **labels: Any) -> list[Line]:
        """A line for each side, printed. amount: operations or bytes of a call, for the `unit`."""
        found = seconds(programs, sets, self.repeats)
        ours = found.get("streamjax")
        lines = []
        for side, median in found.items():
            rate = amount / median / (1e12 if unit == "TFLOP/s" else 1e9)
            lines.append({
                **labels, "side": side, "ms": median * 1e3, unit: rate, "of the ceiling": rate / self.ceilings[unit],
                "ours / this": ours and ours / median,
            })  # fmt: skip
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in lines[-1].items()}, flush=True)
        return lines
