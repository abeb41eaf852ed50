"""What the kernels' public functions refuse, in one line each."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.coded import Coded
from pallas_kernels.unpacking.protocol import Unpackable

DTYPES = ("bfloat16", "float32")
CODES = (Coded, Unpackable)


def scale(given: float | None, q: Array) -> float:
    """The factor on the logits: what is given, or 1 / sqrt(D).

    Raises:
      ValueError: it is not above 0.
    """
    found = 1.0 / math.sqrt(q.shape[-1]) if given is None else float(given)
    if found <= 0.0:
        raise ValueError(f"scale {found}: it must be above 0")
    return found


def flash(q: Array, k: Array, v: Array, segment_ids: Any) -> None:
    """Refuse arguments of `flash_attention` that do not fit together."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"shapes q {q.shape}, k {k.shape}, v {v.shape}: use [B, T, H, D] and twice [B, S, K, D]")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads for {k.shape[2]} key heads: use a multiple")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype.name not in DTYPES:
        raise ValueError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: the kernels take bfloat16 or float32 for all three; "
            "streamjax's implementation='xla' takes any"
        )
    if segment_ids is not None and not isinstance(segment_ids, tuple) and q.shape[1] != k.shape[1]:
        raise ValueError(f"one array of segment ids for {q.shape[1]} queries and {k.shape[1]} keys: give a pair")


def chunk(q: Array, k: Array, v: Array) -> None:
    """Refuse arguments of `chunk_attention` that do not fit together."""
    if q.ndim != 4 or k.ndim != 5 or k.shape != v.shape or k.shape[1] != q.shape[0] or k.shape[4] != q.shape[3]:
        raise ValueError(f"shapes q {q.shape}, k {k.shape}, v {v.shape}: use [B, C, H, D] and twice [R, B, K, S, D]")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads for {k.shape[2]} key heads: use a multiple")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype.name not in DTYPES:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: use bfloat16 or float32 for all")


def decode(q: Array, k: Array | Coded | Unpackable, v: Array | Coded | Unpackable, k_scale: Any, v_scale: Any) -> None:
    """Refuse arguments of `decode_attention` that do not fit together."""
    packed = not isinstance(k, CODES) and k.dtype == jnp.uint8
    if q.ndim != 4 or len(k.shape) != 4 or k.shape != v.shape or k.shape[3] * (2 if packed else 1) != q.shape[3]:
        raise ValueError(f"shapes q {q.shape}, k {k.shape}, v {v.shape}: use [B, C, H, D] and twice [B, K, S, D]")
    if q.shape[0] != k.shape[0] or q.shape[2] % k.shape[1]:
        raise ValueError(f"q {q.shape} and k {k.shape}: use the same rows, and a multiple of the key heads")
    if isinstance(k, CODES) or isinstance(v, CODES):
        return _coded(q, k, v, k_scale, v_scale)
    if q.dtype.name not in DTYPES or k.dtype != v.dtype or k.dtype not in (q.dtype, jnp.int8, jnp.uint8):
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: bfloat16 or float32; k and v also int8, uint8")
    if (k.dtype == q.dtype) != (k_scale is None) or (k_scale is None) != (v_scale is None):
        given = "without scales" if k_scale is None else "with scales"
        raise ValueError(f"k, v of {k.dtype} {given}: int8 and packed int4 need both, others take none")


def _coded(q: Array, k: Any, v: Any, k_scale: Array | None = None, v_scale: Array | None = None) -> None:
    """Refuse codes that do not fit together; each of both has to be codes."""
    if not (isinstance(k, CODES) and isinstance(v, CODES)) or k_scale is not None or v_scale is not None:
        raise ValueError("keys and values in codes: give `Coded` for both, or `Unpackable`, and no scales beside them")
    if q.dtype.name not in DTYPES:
        raise ValueError(f"dtype q {q.dtype}: use bfloat16 or float32")
    for name, x in (("k", k), ("v", v)):
        _, _, slots, width = x.shape
        if isinstance(x, Unpackable):
            _unpackable(name, x)
            continue
        if x.codes.dtype != jnp.uint8 or x.bits not in (8, 4, 2, 1) or x.group % x.planes or slots % x.group:
            raise ValueError(
                f"{name}: {slots} slots of {x.bits} bits in groups of {x.group}: use bytes of whole groups, and 8, 4, "
                "2 or 1 bits"
            )
        columns = {"order": width, "stretch": width}
        if x.tokens is not None:
            columns |= {"tokens": x.tokens.shape[3], "directions": x.tokens.shape[3] * width}
        if x.kept is not None:
            columns |= {"kept": x.kept.shape[3], "channels": x.kept.shape[3]}
        for number, (array, along) in x.numbers.items():
            runs = width if x.along == "channel" or width % array.shape[3] else array.shape[3]
            wanted = slots // x.group if along == "channel" else slots, columns.get(number, runs)
            if array.shape[2:] != wanted:
                raise ValueError(f"{name}: {number} {array.shape}: use [B, K, {wanted}]")
            if array.dtype not in (jnp.bfloat16, jnp.uint8):
                raise ValueError(f"{name}: {number} in {array.dtype}: use bfloat16, or bytes for whole numbers")


def _unpackable(name: str, x: Unpackable) -> None:
    """Refuse numbers that are not there, or not as many as their groups or slots."""
    slots, lies = x.shape[2], x.unpacking.lies
    if x.codes.dtype != jnp.uint8 or slots % x.group or set(x.numbers) != set(lies):
        raise ValueError(
            f"{name}: {slots} slots in groups of {x.group}, with {sorted(x.numbers)}: use bytes of whole groups, and "
            f"numbers {sorted(lies)}"
        )
    for number, where in lies.items():
        array, wanted = x.numbers[number], slots // x.group if where == "group" else slots
        if array.ndim != 4 or (where != "all" and array.shape[2] != wanted):
            raise ValueError(f"{name}: {number} {array.shape}: use [B, K, {wanted}, e]")


def paged(q: Array, k: Array | Coded | Unpackable, v: Array | Coded | Unpackable, pages: Array, page_size: int) -> None:
    """Refuse arguments of `paged_attention` that do not fit together."""
    if q.ndim != 4 or len(k.shape) != 4 or k.shape != v.shape or k.shape[3] != q.shape[3]:
        raise ValueError(f"shapes q {q.shape}, k {k.shape}, v {v.shape}: use [B, C, H, D] and twice [B, K, S, D]")
    if q.shape[0] != k.shape[0] or q.shape[2] % k.shape[1] or pages.shape[:2] != k.shape[:2]:
        raise ValueError(f"q {q.shape}, k {k.shape}, pages {pages.shape}: use the same rows and key heads")
    if isinstance(k, CODES) or isinstance(v, CODES):
        _coded(q, k, v)
    elif not (q.dtype == k.dtype == v.dtype) or q.dtype.name not in DTYPES:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: use bfloat16 or float32 for all")
    least = max(x.group for x in (k, v)) if isinstance(k, CODES) and isinstance(v, CODES) else 32 // q.dtype.itemsize
    if page_size < 1 or page_size % least or k.shape[2] % page_size:
        raise ValueError(f"page_size {page_size} and {k.shape[2]} slots: use a multiple of {least} that divides them")


def pooled(q: Array, k: Array, v: Array, pages: Array, count: Array) -> None:
    """Refuse arguments of `pool_attention` that do not fit together."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[0]:
        raise ValueError(f"shapes q {q.shape}, k {k.shape}, v {v.shape}: use [B, C, H, D] and twice [K, P, S, D]")
    if pages.ndim != 2 or len(pages) != len(q) or count.shape != q.shape[:1]:
        raise ValueError(f"q {q.shape}, pages {pages.shape}, count {count.shape}: use [B, N] pages and [B] counts")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype.name not in DTYPES:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: use bfloat16 or float32 for all")
    if k.shape[2] % (least := 32 // q.dtype.itemsize) or not k.shape[1] or not k.shape[2]:
        raise ValueError(f"{k.shape[1]} pages of {k.shape[2]} tokens: use a multiple of {least}, and at least one page")


def scores(q: Array, summary: Array, some: Array | None, bounds: bool, parts: int) -> None:
    """Refuse arguments of `page_scores` that do not fit together."""
    width = q.shape[3] * (2 if bounds else 1)
    if q.ndim != 4 or summary.ndim != 4 or parts < 1 or summary.shape[3] != parts * width:
        wanted = f"[B, C, H, D] and [B, K, P, {parts} x {width}]"
        raise ValueError(f"shapes q {q.shape}, summary {summary.shape}: use {wanted}")
    if q.shape[0] != summary.shape[0] or q.shape[2] % summary.shape[1]:
        raise ValueError(f"q {q.shape} and summary {summary.shape}: use the same rows, and a multiple of the key heads")
    if some is not None and some.shape != (*summary.shape[:3], parts):
        raise ValueError(f"some {some.shape} for {summary.shape} in {parts} parts: use [B, K, P, parts]")
    if q.dtype != summary.dtype or q.dtype.name not in DTYPES:
        raise ValueError(f"dtypes q {q.dtype}, summary {summary.dtype}: use bfloat16 or float32 for both")


def hsa(q: Array, k: Array, v: Array, chosen: Array, weights: Array, block: int | None) -> None:
    """Refuse arguments of `hsa_attention` that do not fit together."""
    if q.ndim != 4 or k.ndim != 5 or k.shape != v.shape or k.shape[4] != q.shape[3]:
        raise ValueError(f"shapes q {q.shape}, k {k.shape}, v {v.shape}: use [B, C, H, D] and twice [B, K, P, S, D]")
    wanted = (q.shape[0], k.shape[1], q.shape[1])
    if q.shape[0] != k.shape[0] or q.shape[2] % k.shape[1] or chosen.shape[:3] != wanted or not k.shape[2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, chosen {chosen.shape}: use [B, K, C, N] choices of at least 1 page"
        )
    if chosen.shape != weights.shape or not chosen.shape[3]:
        raise ValueError(
            f"chosen {chosen.shape}, weights {weights.shape}: use the same shape, at least 1 choice a query"
        )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype.name not in DTYPES:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: use bfloat16 or float32 for all")
    if k.shape[3] % (least := 32 // q.dtype.itemsize) or not k.shape[3]:
        raise ValueError(f"pages of {k.shape[3]} tokens: use a multiple of {least}")
    if block is not None and block < 1:
        raise ValueError(f"tiles of {block} rows: use at least 1, or None")


def token_stats(x: Array, w: Array, targets: Array, vocab_axis: int, block: int | None) -> None:
    """Refuse arguments of `token_stats` that do not fit together."""
    if vocab_axis not in (0, 1) or x.ndim != 2 or w.ndim != 2 or w.shape[1 - vocab_axis] != x.shape[1]:
        wanted = "[N, E] and [V, E], or [E, V] with vocab_axis=1"
        raise ValueError(f"shapes x {x.shape}, w {w.shape}, vocab_axis={vocab_axis}: use {wanted}")
    if targets.shape != x.shape[:1] or not x.shape[0]:
        raise ValueError(f"targets {targets.shape} for x {x.shape}: use one for each of at least 1 token")
    if x.dtype != w.dtype or x.dtype.name not in DTYPES:
        raise ValueError(f"dtypes x {x.dtype}, w {w.dtype}: use bfloat16 or float32 for both")
    if block is not None and (block < 128 or block % 128):
        raise ValueError(f"blocks of {block} entries: use a multiple of 128, or None")


def delta_update(q: Array, k: Array, v: Array, decay: Array, beta: Array, state: Array) -> None:
    """Refuse arguments of `delta_update` that do not fit together."""
    given = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta}
    if state.ndim == 5:
        batch, groups, shared, keys, width = state.shape
        pair, heads = (batch, groups, keys), (batch, groups, shared)
        wanted = {"q": pair, "k": pair, "v": (*heads, width), "decay": (*heads, keys), "beta": heads}
    if state.ndim != 5 or any(x.shape != wanted[name] for name, x in given.items()):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in (*given.items(), ("state", state)))
        raise ValueError(
            f"shapes {shapes}: use twice [B, G, K], then [B, G, R, V], [B, G, R, K], [B, G, R] and [B, G, R, K, V]"
        )
    wrong = next((x.dtype for x in (*given.values(), state) if x.dtype != jnp.float32), None)
    if wrong is not None:
        raise ValueError(f"dtype {wrong}: delta_update takes float32")


def chunkwise(q: Array, k: Array, v: Array, log_decay: Array, beta: Any, state: Array, resets: Any, block: Any) -> None:
    """Refuse arguments of `chunkwise_recurrence` that do not fit together."""
    given = {"q": q, "k": k, "v": v, "log_decay": log_decay, "state": state, "beta": beta, "resets": resets}
    given = {name: x for name, x in given.items() if x is not None}
    if q.ndim == 4 and v.ndim == 5:
        (batch, length, groups, keys), (shared, width) = q.shape, v.shape[3:]
        heads = (batch, length, groups, shared)
        decay = (*heads, keys) if log_decay.ndim == 5 else heads
        wanted = {"q": q.shape, "k": q.shape, "v": (*heads, width), "log_decay": decay, "beta": heads}
        wanted |= {"state": (batch, groups, shared, keys, width), "resets": (batch, length)}
    if q.ndim != 4 or v.ndim != 5 or not q.shape[1] or any(x.shape != wanted[name] for name, x in given.items()):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in given.items())
        raise ValueError(
            f"shapes {shapes}: use twice [B, T, G, K], then [B, T, G, R, V], [B, T, G, R] or [B, T, G, R, K], "
            "[B, G, R, K, V], [B, T, G, R] and [B, T], T at least 1"
        )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype.name not in DTYPES:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: use bfloat16 or float32 for all")
    for name in ("log_decay", "state", "beta"):
        if name in given and given[name].dtype != jnp.float32:
            raise ValueError(f"dtype {name} {given[name].dtype}: use float32")
    if block is not None and (block < 16 or block & (block - 1)):
        raise ValueError(f"blocks of {block} tokens: use a power of two, at least 16")
