"""Log-probabilities of given tokens, without gradient and without all logits: what DPO and GRPO compare with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from streamjax.attention.block_cutting import cut_blocks, join_blocks
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import without_layers
from streamjax.training.backprop.embedding_and_head import default_logits_chunk
from streamjax.training.backprop.gradient_reduction import Reduction
from streamjax.training.backprop.head.passes import head_stats
from streamjax.training.backprop.layer_order import place_forward
from streamjax.training.backprop.loss_and_grad import DEFAULT_CHUNK
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, chunk_at
from streamjax.training.backprop.storage.landmark_memory import Memories, empty_memories, whole_pages
from streamjax.training.backprop.storage.layer_stack import LayerStack, layer_stacks
from streamjax.training.objectives.objective import Batch, require_arrays, require_no_prefix, require_targets


def token_log_probs(
    model: Decoder,
    batch: Mapping[str, Array | np.ndarray],
    *,
    chunk_size: int | None = None,
    logits_chunk: int | None = None,
) -> Float[Array, "B T"]:
    """Log-probability of every target of a batch under a model.

    The forward pass of the layer order: layer by layer, and inside a layer chunk by chunk, so that of a sequence only
    one layer's input and its keys and values exist.

    Args:
      model: the model.
      batch: tokens, targets int32 [B, T] and weights float32 [B, T]; segment_ids and positions int32 [B, T] if packed.
      chunk_size: tokens of a chunk; at most T. 2048, or T where that is less, where None.
      logits_chunk: tokens of a row whose logits exist at once; by default as many as make 256 MiB.

    Returns:
      Natural logarithms, float32 (float64 for a float64 model); 0 for tokens of weight 0, whatever their target.

    Raises:
      ValueError: a batch that makes no sense, as for `loss_and_grad`.
    """
    require_arrays(batch, ("tokens", "targets", "weights"))
    require_targets(batch, model.config.vocab_size)
    require_no_prefix(batch)
    rows, length = batch["tokens"].shape
    if chunk_size is not None and not 1 <= chunk_size <= length:
        raise ValueError(f"chunk_size is {chunk_size}: use 1 to {length}, the length of the batch's sequences")
    return _token_log_probs(
        model,
        {name: jnp.asarray(x) for name, x in batch.items()},
        whole_pages(model.config, min(chunk_size or DEFAULT_CHUNK, length)),
        logits_chunk or default_logits_chunk(model, rows),
    )


@partial(jax.jit, static_argnums=(2, 3))
def _token_log_probs(model: Decoder, batch: Batch, chunk_size: int, logits_chunk: int) -> Float[Array, "B T"]:
    counted = batch["weights"] != 0
    sequence = ChunkedSequence.cut(batch, {"targets": jnp.where(counted, batch["targets"], 0)}, chunk_size)
    ends, steps = without_layers(model), jnp.arange(sequence.count)
    x = jax.lax.map(lambda i: ends.embed(chunk_at(sequence.tokens, i)), steps)
    remembered = empty_memories(model.config, sequence, model.dtype)
    for rows in layer_stacks(model, nnx.Param, None, Reduction()):
        x = rows.loop(0, rows.count, partial(_row_forward, rows, sequence, remembered), x)
    stats = head_stats(ends, x, sequence.prepared["targets"], cut_blocks(counted, chunk_size), logits_chunk)
    return join_blocks(stats.logp, sequence.length)


def _row_forward(
    rows: LayerStack, sequence: ChunkedSequence, remembered: Memories, row: Any, x: Float[Array, "N B C E"]
) -> Float[Array, "N B C E"]:
    for position in range(rows.period):
        x, _ = place_forward(rows, sequence, remembered, False, row, position, x)
    return x
