"""The loss of streams that never end, and its gradient, truncated where a batch begins.

Each row of a batch is a stream, which the same row of the next batch continues. Inside a batch the tokens are read
chunk by chunk as `streamjax.score` reads them, and the gradient flows from chunk to chunk through the cached keys and
values. At the start of a batch the cache is a constant: truncated backpropagation through time (Williams and Peng
1990), with the state of a KV cascade where Transformer-XL (1901.02860) has the segment before. So a model is trained on
exactly what it sees when it streams.

Of a batch only the states between chunks are kept; what happens inside a chunk is computed again for the backward pass.
The memory is that of one chunk and of a state for each chunk, however long the streams are. Gradients of cached keys
and values have the cache's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from streamjax.attention.block_cutting import cut_blocks
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import unstack_layers
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance
from streamjax.training.backprop.embedding_and_head import default_logits_chunk
from streamjax.training.backprop.head.whole_sequence import whole_sequence_loss
from streamjax.training.backprop.loss_and_grad import DEFAULT_CHUNK
from streamjax.training.backprop.routing import with_routing_total
from streamjax.training.backprop.trainable_parameters import Trainable, combine, partition
from streamjax.training.objectives.objective import Batch, CrossEntropy, Objective, require_no_prefix


def streaming_loss_and_grad(
    model: Decoder,
    state: StreamState,
    batch: Mapping[str, Array | np.ndarray],
    *,
    objective: Objective | None = None,
    chunk_size: int | None = None,
    logits_chunk: int | None = None,
    trainable: Trainable = nnx.Param,
) -> tuple[Float[Array, ""], Decoder, StreamState]:
    """Loss of a batch of streams, its gradient, and the state with which the next batch goes on.

    Args:
      model: the model.
      state: where the streams stand, one a row; `streamjax.init_state` makes the first one. A constant: nothing flows
        into the batches before this one. A `dense` cache must have room for the batch.
      batch: tokens, targets int32 [B, T] and weights float32 [B, T]. The last target of a row is the first token of the
        row in the next batch.
      objective: what is minimised; `CrossEntropy()` where None, the weighted mean over tokens in nats.
      chunk_size: at most so many tokens of a stream are read at once; 2048 where None. For caches of sinks and windows
        the loss does not depend on it.
      logits_chunk: tokens of a row whose logits exist at once; by default as many as make 256 MiB.
      trainable: the type of parameters that get a gradient; the others are constants, and None in the result.

    Returns:
      The loss, the gradient, shaped as the model, and the new state.

    Raises:
      ValueError: a batch that makes no sense (see `loss_and_grad`), or that has segments; another number of rows than
        streams; an objective that is not a sum over tokens.
    """
    objective = CrossEntropy() if objective is None else objective
    objective.check(batch, model.config.vocab_size)
    require_no_prefix(batch)
    if "segment_ids" in batch:
        raise ValueError("the batch has segments, which a stream has not: leave segment_ids and positions out")
    if not objective.separable:
        raise ValueError(f"{type(objective).__name__} is not a sum over tokens: a stream cannot be trained on it")
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    model = with_routing_total(model, batch["tokens"].size)
    loss, grads, after = _loss_and_grad(model, state, batch, objective, chunk_size, logits_chunk, trainable)
    return loss, with_routing_total(grads, None), after


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _loss_and_grad(
    model: Decoder,
    state: StreamState,
    batch: Batch,
    objective: Objective,
    chunk_size: int | None,
    logits_chunk: int | None,
    trainable: Trainable,
) -> tuple[Float[Array, ""], Decoder, StreamState]:
    params, rest = partition(model, trainable)

    def loss(params: Decoder) -> tuple[Array, StreamState]:
        model = combine(params, rest)
        return streaming_loss(model, state, batch, objective, chunk_size=chunk_size, logits_chunk=logits_chunk)

    (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, grads, after


def streaming_loss(
    model: Decoder,
    state: StreamState,
    batch: Batch,
    objective: Objective,
    *,
    chunk_size: int | None = None,
    logits_chunk: int | None = None,
) -> tuple[Float[Array, ""], StreamState]:
    """The loss of a batch and the streams' state behind it, for `jax.grad`; see `streaming_loss_and_grad`."""
    if len(model.stack):
        model = unstack_layers(model)  # here once, and not in each chunk
    rows, length = batch["tokens"].shape
    chunks = math.ceil(length / (chunk_size or DEFAULT_CHUNK))
    width = math.ceil(length / chunks)
    pad = chunks * width - length
    logits_chunk = logits_chunk or default_logits_chunk(model, rows)

    def cut(x: Array) -> Array:
        return cut_blocks(x, width)

    @jax.checkpoint
    def read(
        model: Decoder, state: StreamState, tokens: Array, prepared: Batch, count: Array
    ) -> tuple[StreamState, Array]:
        state, hidden = advance(model, state, tokens, jnp.broadcast_to(count, rows), differentiable=True)
        if pad:
            # Behind a full `dense` cache padding is NaN, which a weight of 0 would not keep out of the gradient.
            hidden = jnp.where((jnp.arange(width) < count)[:, None], hidden, 0)
        return state, whole_sequence_loss(model, hidden, prepared, objective, logits_chunk)

    counts = jnp.clip(length - jnp.arange(chunks, dtype=jnp.int32) * width, 0, width)
    pieces = cut(batch["tokens"]), jax.tree.map(cut, objective.prepare(batch)), counts
    state, parts = jax.lax.scan(lambda state, piece: read(model, state, *piece), state, pieces)
    return jnp.sum(parts), state
