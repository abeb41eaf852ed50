"""The decoding kernels' part of `benchmarks/gpu_kernels.py`: what they read, how right they are, and how fast.

One token for 8 streams over a ring of slots that is full. What bounds it is the memory: each row says how many GB/s of
cache were read, beside those of a copy. `paged` reads 32 pages of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import SHAPES
from pallas_kernels import api, reference
from streamjax.attention.dense import attend

CACHES = ("decode", "decode-int8", "decode-int4", "paged")
BATCH, PAGE, PAGES = 8, 64, 32
COPIES = 3  # of the inputs, which take turns
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


def ours(name: str, arrays: Mapping[str, jax.Array]) -> Any:
    if name == "paged":
        return api.paged_attention(**arrays, page_size=PAGE, implementation="triton")
    return api.decode_attention(**arrays, implementation="triton")


def by_xla(arrays: Mapping[str, jax.Array]) -> Any:
    """The whole cache by XLA, as the streaming loop decodes where there is no kernel."""
    k = arrays["k"]
    age = (jnp.arange(k.shape[2]) - arrays["first"][:, None]) % k.shape[2]
    seen = (age < arrays["count"][:, None])[:, None, None]
    return attend(arrays["q"], k, arrays["v"], seen, scale=float(k.shape[3]) ** -0.5)


def errors(model: str, name: str, length: int = 64 * 40) -> dict[str, float]:
    """Largest relative error against float64, for both dtypes of queries."""
    found = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        arrays = inputs(model, name, length, 0, dtype)
        mine = jax.jit(partial(ours, name))(arrays)
        with jax.enable_x64(True):
            exact = {key: jnp.asarray(_plain(key, arrays)) for key in ("q", "k", "v", "count", "first")}
            scale = float(exact["q"].shape[-1]) ** -0.5
            if name == "paged":
                right = reference.paged_attention(**exact, pages=arrays["pages"], page_size=PAGE, scale=scale)
            else:
                right = reference.decode_attention(**exact, scale=scale)
            right = jax.tree.map(np.asarray, right)
        each = [
            np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b)) for a, b in zip(mine, right, strict=True)
        ]
        found[jnp.dtype(dtype).name] = float(max(each))
    return found


def _plain(name: str, arrays: Mapping[str, jax.Array]) -> np.ndarray:
    """An input in float64, of what is quantised what it stands for; counts as they are."""
    x = np.asarray(arrays[name])
    if x.dtype == np.int32:
        return x
    if x.dtype == np.uint8:
        low, high = (x.astype(np.int8) << 4) >> 4, x.astype(np.int8) >> 4
        x = np.concatenate((low, high), axis=-1)
    x = x.astype(np.float64)
    return x * np.asarray(arrays[f"{name}_scale"], np.float64)[..., None] if f"{name}_scale" in arrays else x


def measure(
    model: str, name: str, length: int, peak: float, seconds: Callable[[Mapping[str, Any]], dict[str, float]]
) -> list[dict[str, Any]]:
    """A line for each side. peak: GB/s of a copy. seconds: medians of programs over their inputs."""
    sets = [(inputs(model, name, length, seed),) for seed in range(COPIES)]
    first = sets[0][0]
    read = sum(first[x].nbytes for x in ("k", "v", "k_scale", "v_scale") if x in first)
    if name == "paged":
        read = read * PAGES * PAGE // length
    programs = {"streamjax": (jax.jit(partial(ours, name)), sets)}
    if name == "decode":
        programs["xla"] = jax.jit(by_xla), sets
    found, lines = seconds(programs), []
    for label, median in found.items():
        rate = read / median / 1e9
        lines.append({
            "model": model, "pattern": name, "tokens": length, "direction": "decode", "side": label,
            "ms": median * 1e3, "GB/s": rate, "of the ceiling": rate / peak,
            "ours / this": found["streamjax"] / median,
        })  # fmt: skip
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in lines[-1].items()}, flush=True)
    return lines
