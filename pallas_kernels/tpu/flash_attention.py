"""FlashAttention for TPUs as one differentiable function."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.flash_call import Call, no_gradient, safe
from pallas_kernels.padding import padded
from pallas_kernels.partial import Partial, named
from pallas_kernels.patterns import Pattern
from pallas_kernels.tile_logits import Settings
from pallas_kernels.tpu import flash_backward
from pallas_kernels.tpu.flash_forward import forward
from pallas_kernels.tpu.flash_operands import along_lanes, along_sublanes
from pallas_kernels.tpu.tiles import LANES

MAX_SINKS = 1024  # they stay in the chip's memory
BLOCK_Q, BLOCK_K = 1024, 1024


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    pattern: Pattern,
    *,
    scale: float,
    segment_ids: tuple[Int32[Array, "B T"], Int32[Array, "B S"]] | None = None,
    offset: Int[Array, ""] | int = 0,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.flash_attention` on a TPU; see there for the arguments.

    block_q, block_k: tokens of a block; multiples of 128, or all of a shorter sequence. interpret: run in Pallas's TPU
    interpreter, with these parameters.

    Raises:
      ValueError: the sinks are more than the kernel holds, or a block is not a multiple of 128.
    """
    if min(pattern.sinks, k.shape[1]) > MAX_SINKS:
        raise ValueError(f"{pattern.sinks} sinks: the TPU kernel takes {MAX_SINKS} at most; use implementation='xla'")
    block_q, block_k = (
        min(block or default, -(-x.shape[1] // LANES) * LANES)
        for block, default, x in ((block_q, BLOCK_Q, q), (block_k, BLOCK_K, k))
    )
    if block_q % LANES or block_k % LANES:
        raise ValueError(f"blocks of {block_q} queries and {block_k} keys: use multiples of {LANES}")
    call = Call.make(
        q.shape[1], k.shape[1], q.shape[2] // k.shape[2], pattern, block_q, block_k, scale=scale, softcap=softcap,
        slopes=slopes, segment_ids=segment_ids, interpret=interpret, offset=offset if isinstance(offset, int) else None,
    )  # fmt: skip
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q, k, v = (padded(x, 2, block) for x, block in zip(heads_first, (block_q, block_k, block_k), strict=True))
    extra = extra_operands(call, slopes, segment_ids)
    return partial_of(call, *_attention(call, q, k[None], v[None], extra, jnp.asarray(offset, jnp.int32)))


def partial_of(call: Call, out: Float[Array, "B H P D"], lse: Float[Array, "B H 1 P"]) -> Partial:
    """What the kernel returns, without padding."""
    return Partial(*(jnp.swapaxes(x, 1, 2)[:, : call.queries] for x in (out, lse[:, :, 0])))


def extra_operands(call: Call, slopes: Array | None, segment_ids: tuple[Array, Array] | None) -> dict[str, Array]:
    """Slopes, and segment ids of whole blocks, where there are any."""
    found: dict[str, Array] = {}
    if slopes is not None:
        found["slopes"] = slopes.astype(jnp.float32)
    if segment_ids is not None:
        found["query_ids"] = padded(segment_ids[0].astype(jnp.int32), 1, call.block_q)
        found["key_ids"] = padded(segment_ids[1].astype(jnp.int32), 1, call.block_k)
    return found


def all_operands(call: Call, q: Array, k: Array, v: Array, extra: dict[str, Array], row: Any = 0) -> dict[str, Array]:
    """What the kernels read, forwards; q heads first, k and v buffers of which `row` is meant."""
    found = {"q": q, "k": k, "v": v}
    if call.settings.sinks:
        held = -(-call.settings.sinks // LANES) * LANES

        def first(x: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(x[:, :, :, :held], row, 1) if x.shape[0] > 1 else x[:, :, :, :held]
            return padded(rows[0], 2, held)

        found |= {"sink_k": first(k), "sink_v": first(v)}
    if "slopes" in extra:
        found["slopes"] = extra["slopes"]
    if call.settings.segmented:
        found |= {"query_rows": along_sublanes(extra["query_ids"]), "key_columns": along_lanes(extra["key_ids"])}
        if call.settings.sinks:
            found["sink_columns"] = padded(found["key_columns"][:, :, :held], 2, held)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q: Array, k: Array, v: Array, extra: dict[str, Array], offset: Array) -> Any:
    return _forward(call, q, k, v, extra, offset)[0]


def _forward(call: Call, q: Array, k: Array, v: Array, extra: dict[str, Array], offset: Array) -> Any:
    operands = all_operands(call, q, k, v, extra)
    at = offset if call.offset is None else call.offset
    out, lse = named(forward(call.settings, call.ranges(), operands, at, call.interpret))
    return (out, lse), (q, k, v, extra, offset, out, lse)


def _backward(call: Call, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    q, k, v, extra, offset, out, lse = saved
    d_out, d_lse = cotangents
    at = offset if call.offset is None else call.offset
    d_q, d_k, d_v = gradients(call, all_operands(call, q, k, v, extra), extra, (out, lse), d_out, d_lse, at)
    grads = d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)
    return *grads, no_gradient(extra), no_gradient(offset)


def gradients(
    call: Call,
    operands: dict[str, Array],
    extra: dict[str, Array],
    found: tuple[Float[Array, "B H P D"], Float[Array, "B H 1 P"]],
    d_out: Float[Array, "B H P D"],
    d_lse: Float[Array, "B H 1 P"] | float,
    offset: Any,
    row: Any = 0,
    sums: tuple[Array, Array] | None = None,
) -> tuple[Float[Array, "B H P D"], Float[Array, "R B K S D"], Float[Array, "R B K S D"]]:
    """Gradients of q, k and v from what the forward pass read and `found`; added to `sums` where they are given."""
    settings, run, (out, lse) = call.settings, call.interpret, found
    # As the kernels multiply it: `shift` must cancel against the same numbers.
    d_out = d_out.astype(operands["q"].dtype)
    operands = operands | {
        "d_out": d_out,
        "lse": safe(lse),
        "shift": d_lse - jnp.sum(d_out.astype(out.dtype) * out, axis=-1)[:, :, None],
    }
    d_q, *d_sinks = flash_backward.query_gradients(settings, call.ranges(), operands, offset, run, row)
    if settings.segmented:
        operands |= {"query_columns": along_lanes(extra["query_ids"]), "key_rows": along_sublanes(extra["key_ids"])}
    if sums is not None:
        operands |= {"d_k": sums[0], "d_v": sums[1]}
    d_k, d_v = flash_backward.key_gradients(settings, call.ranges(transposed=True), operands, offset, run, row)
    d_k, d_v = (x if y is None else _with_sinks(settings, x, y, row) for x, y in zip((d_k, d_v), d_sinks, strict=True))
    return d_q, d_k, d_v


def _with_sinks(
    settings: Settings, grads: Float[Array, "R B K S D"], sinks: Float[Array, "B H N D"], row: Any
) -> Array:
    """Gradients of keys with those of the sinks, by query head, added."""
    batch, heads, held, width = sinks.shape
    summed = jnp.sum(sinks.reshape(batch, heads // settings.group, settings.group, held, width), axis=2)
    return grads.at[row, :, :, : settings.sinks].add(summed[:, :, : settings.sinks].astype(grads.dtype))


_attention.defvjp(_forward, _backward)
