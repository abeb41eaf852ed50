"""The part of `all_kernels` about decoding: what the kernels read, how right they are, and how fast.

One token for 8 streams over a ring of slots that is full. What bounds it is the memory: each row says how many GB/s of
cache were read, beside those of a copy. `paged` reads 32 pages of 64 tokens; `scores` the bounds of all such pages,
two pairs a page, beside the index of the library that XLA computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from benchmarks.kernels.gpu.parts import Device, Line, copies, exact, worst
from benchmarks.model_shapes import SHAPES
from pallas_kernels import api, reference
from streamjax.attention.dense import attend
from streamjax.kv.pages.indexes import MinMax

NAMES = ("decode", "decode-int8", "decode-int4", "paged", "scores")
KERNELS = ("triton",)
BATCH, PAGE, PAGES = 8, 64, 32
PARTS = 2  # pairs of bounds of a page
Arrays = dict[str, jax.Array]


def inputs(model: str, name: str, length: int, seed: int, dtype: Any = jnp.bfloat16) -> Arrays:
    """What a kernel is called with, by name: queries, and a ring of `length` slots whose oldest token is not first."""
    config = SHAPES[model]
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = BATCH, config.num_kv_heads, length, config.head_dim
    rows = jnp.arange(BATCH, dtype=jnp.int32)
    found = {
        "q": jax.random.normal(keys[0], (BATCH, 1, config.num_heads, config.head_dim), dtype),
        "count": length - 7 * rows,
        "first": (length // 3 + rows) % length,
    }
    if name in ("decode", "paged"):
        found |= {x: jax.random.normal(key, shape, dtype) for x, key in zip("kv", keys[1:], strict=False)}
    else:
        top = 2 ** (int(name[-1]) - 1)
        for x, key in zip("kv", keys[1:], strict=False):
            numbers = jax.random.randint(key, shape, -top, top, jnp.int8)
            found[x] = api.pack_int4(numbers) if top == 8 else numbers
            found[f"{x}_scale"] = jax.random.uniform(keys[3], shape[:3], jnp.float32, 0.5, 1.5) / top
    if name == "paged":
        order = jax.random.split(keys[3], BATCH * config.num_kv_heads)
        pages = jax.vmap(lambda key: jax.random.permutation(key, length // PAGE)[:PAGES])(order)
        found["pages"] = pages.reshape(BATCH, config.num_kv_heads, -1).astype(jnp.int32)
    return found


def bounds(model: str, length: int, seed: int, dtype: Any = jnp.bfloat16) -> Arrays:
    """What `page_scores` is called with: the newest page's second half is still empty."""
    config, keys = SHAPES[model], jax.random.split(jax.random.key(seed), 3)
    sides = BATCH, config.num_kv_heads, length // PAGE, PARTS, config.head_dim
    low = jax.random.normal(keys[0], sides, dtype)
    high = low + jax.random.uniform(keys[1], sides, dtype)
    some = jnp.ones(sides[:4], bool).at[:, :, -1, 1:].set(False)
    return {
        "q": jax.random.normal(keys[2], (BATCH, 1, config.num_heads, config.head_dim), dtype),
        "summary": jnp.stack((high, low), axis=4).reshape(*sides[:3], -1),
        "some": some,
    }


def ours(name: str, arrays: Mapping[str, jax.Array], interpret: bool = False) -> Any:
    known: Any = {"implementation": "triton", "interpret": interpret}
    if name == "scores":
        return api.page_scores(**arrays, bounds=True, parts=PARTS, **known)
    if name == "paged":
        return api.paged_attention(**arrays, page_size=PAGE, **known)
    return api.decode_attention(**arrays, **known)


def by_xla(arrays: Mapping[str, jax.Array]) -> Any:
    """The whole cache by XLA, as the streaming loop decodes where there is no kernel."""
    k = arrays["k"]
    age = (jnp.arange(k.shape[2]) - arrays["first"][:, None]) % k.shape[2]
    seen = (age < arrays["count"][:, None])[:, None, None]
    return attend(arrays["q"], k, arrays["v"], seen, scale=float(k.shape[3]) ** -0.5)


def by_index(arrays: Mapping[str, jax.Array]) -> Any:
    """Scores by XLA, as streams make them where there is no kernel."""
    q, summary = arrays["q"], arrays["summary"]
    by_head = rearrange(q, "b c (k g) d -> b k (g c) d", k=summary.shape[1])
    return MinMax(PARTS).scores((summary, arrays["some"]), by_head)


def errors(
    model: str, name: str, kernel: str = "triton", dtype: Any = jnp.bfloat16, length: int = 64 * 40,
    interpret: bool = False,
) -> float:  # fmt: skip
    """Largest relative error against float64."""
    arrays = bounds(model, length, 0, dtype) if name == "scores" else inputs(model, name, length, 0, dtype)
    mine = jax.jit(partial(ours, name, interpret=interpret))(arrays)
    with jax.enable_x64(True):
        plain = exact({key: _plain(key, arrays) for key in arrays if "scale" not in key})
        if name == "scores":
            return worst(mine, reference.page_scores(**plain, bounds=True, parts=PARTS))
        scale = float(SHAPES[model].head_dim) ** -0.5
        if name == "paged":
            return worst(mine, reference.paged_attention(**plain, page_size=PAGE, scale=scale))
        return worst(mine, reference.decode_attention(**plain, scale=scale))


def _plain(name: str, arrays: Mapping[str, jax.Array]) -> np.ndarray:
    """An input, of what is quantised what it stands for in float64."""
    x = np.asarray(arrays[name])
    if x.dtype == np.uint8:
        low, high = (x.astype(np.int8) << 4) >> 4, x.astype(np.int8) >> 4
        x = np.concatenate((low, high), axis=-1)
    return x * np.asarray(arrays[f"{name}_scale"], np.float64)[..., None] if f"{name}_scale" in arrays else x


def measure(model: str, name: str, length: int, kernels: Sequence[str], device: Device) -> list[Line]:
    """A line for each side."""
    make = partial(bounds, model, length) if name == "scores" else partial(inputs, model, name, length)
    sets = [(x,) for x in copies(make)]
    first = sets[0][0]
    read = sum(first[x].nbytes for x in ("k", "v", "k_scale", "v_scale", "summary") if x in first)
    if name == "paged":
        read = read * PAGES * PAGE // length
    programs: dict[str, Callable[..., Any]] = {"streamjax": partial(ours, name)}
    if name in ("decode", "scores"):
        programs["xla"] = by_xla if name == "decode" else by_index
    labels = {"model": model, "pattern": name, "tokens": length, "direction": "decode"}
    return device.lines(programs, sets, "GB/s", read, **labels)
