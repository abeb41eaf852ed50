"""The part of `all_kernels` about weights in four bits: one token for 8 streams times the matrices of an MLP.

`int4-up` has its inputs first, as kernels of layers lie; `int4-table` its outputs, as a table of embeddings lies. What
bounds both is the memory: each row says how many GB/s of codes, offsets and scales were read. XLA computes the same
from the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.gpu.parts import Device, Line, copies, worst
from benchmarks.model_shapes import SHAPES
from pallas_kernels import api
from streamjax.models.quantisation import QuantisedWeight
from streamjax.models.rounding import GROUP

NAMES = ("int4-up", "int4-table")
KERNELS = ("triton",)
ROWS = 8
Arrays = dict[str, jax.Array]


def inputs(model: str, name: str, outputs: int, seed: int, dtype: Any = jnp.bfloat16) -> Arrays:
    """Activations, and codes, offsets and scales of a matrix with so many outputs."""
    keys, count = jax.random.split(jax.random.key(seed), 4), SHAPES[model].d_model
    turn = -1 if name == "int4-table" else 1
    of_codes, of_groups = ((count // n, outputs)[::turn] for n in (2, GROUP))
    return {
        "x": jax.random.normal(keys[0], (ROWS, count), dtype),
        "codes": jax.random.bits(keys[1], of_codes, jnp.uint8),
        "offsets": jax.random.randint(keys[2], of_groups, -128, 128, jnp.int8),
        "scales": jax.random.uniform(keys[3], of_groups, jnp.bfloat16, 0.5, 1.5),
    }


def ours(name: str, arrays: Mapping[str, jax.Array], interpret: bool = False) -> jax.Array:
    known: Any = {"implementation": "triton", "interpret": interpret}
    return api.grouped_product(**arrays, outputs_first=name == "int4-table", **known)


def by_xla(name: str, arrays: Mapping[str, jax.Array]) -> jax.Array:
    """The matrix dequantised, then a product."""
    x, codes, offsets, scales = (arrays[key] for key in ("x", "codes", "offsets", "scales"))
    axis = -1 if name == "int4-table" else -2
    dense = QuantisedWeight(codes, offsets, scales, axis).astype(x.dtype)
    return jnp.dot(x, dense.T if axis == -1 else dense, preferred_element_type=jnp.float32)


def exactly(name: str, arrays: Mapping[str, jax.Array]) -> np.ndarray:
    """The product in float64, a group's bytes taken apart one by one."""
    x, codes, offsets, scales = (np.asarray(arrays[key]) for key in ("x", "codes", "offsets", "scales"))
    if name == "int4-table":
        codes, offsets, scales = codes.T, offsets.T, scales.T
    half = len(codes) // len(scales)
    total = np.zeros((len(x), codes.shape[1]))
    for group, (offset, scale) in enumerate(zip(offsets, scales.astype(np.float64), strict=True)):
        pairs = codes[group * half : (group + 1) * half].astype(np.float64)
        dense = np.concatenate((pairs % 16, pairs // 16)) - 8 + offset.astype(np.float64) / 16
        total += x[:, 2 * half * group : 2 * half * (group + 1)].astype(np.float64) @ (dense * scale)
    return total


def errors(
    model: str, name: str, kernel: str = "triton", dtype: Any = jnp.bfloat16, length: int = 1000,
    interpret: bool = False,
) -> float:  # fmt: skip
    """Largest relative error against float64."""
    arrays = inputs(model, name, length, 0, dtype)
    return worst(jax.jit(partial(ours, name, interpret=interpret))(arrays), exactly(name, arrays))


def measure(model: str, name: str, length: int, kernels: Sequence[str], device: Device) -> list[Line]:
    """A line for each side; a cache's `length` does not matter."""
    config = SHAPES[model]
    outputs = config.vocab_size if name == "int4-table" else 2 * config.mlp_dim
    sets = [(x,) for x in copies(partial(inputs, model, name, outputs))]
    read = sum(sets[0][0][key].nbytes for key in ("codes", "offsets", "scales"))
    programs: dict[str, Callable[..., Any]] = {"streamjax": partial(ours, name), "xla": partial(by_xla, name)}
    labels = {"model": model, "pattern": name, "tokens": ROWS, "direction": "decode"}
    return device.lines(programs, sets, "GB/s", read, **labels)
