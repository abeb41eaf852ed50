"""What a teacher hands over of a batch: its likeliest tokens, or what its layers read and make."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from streamjax.attention.block_cutting import cut_blocks, even_size, join_blocks
from streamjax.models.decoder import Decoder
from streamjax.training.backprop.embedding_and_head import default_logits_chunk
from streamjax.training.distillation.alignment import layer_examples
from streamjax.training.objectives.objective import Batch, require_no_prefix


@partial(jax.jit, static_argnames=("top_k", "logits_chunk"))
def predictions(
    teacher: Decoder, batch: Batch, top_k: int, logits_chunk: int | None = None
) -> tuple[Int32[Array, "B T N"], Float[Array, "B T N"]]:
    """The likeliest tokens behind each token, and their log-probabilities; logits exist for a part at a time.

    Args:
      teacher: the model.
      batch: tokens int32 [B, T]; segment_ids and positions int32 [B, T] if packed.
      top_k: N, at most the vocabulary.
      logits_chunk: tokens of a row whose logits exist at once; by default as many as make 256 MiB.
    """
    require_no_prefix(batch)
    tokens = batch["tokens"]
    hidden = teacher.hidden(tokens, positions=batch.get("positions"), segment_ids=batch.get("segment_ids"))
    size = even_size(tokens.shape[1], logits_chunk or default_logits_chunk(teacher, tokens.shape[0]))

    def best(hidden: Array) -> tuple[Array, Array]:
        logits = teacher.logits(hidden)
        values, ids = jax.lax.top_k(logits, top_k)
        return ids.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    ids, logp = jax.lax.map(best, cut_blocks(hidden, size))
    return join_blocks(ids, tokens.shape[1]), join_blocks(logp, tokens.shape[1])


@partial(jax.jit, static_argnames="layers")
def examples(
    teacher: Decoder, batch: Batch, layers: tuple[int, ...]
) -> tuple[Float[Array, "B L T E"], Float[Array, "B L T E"]]:
    """`layer_examples`, compiled."""
    return layer_examples(teacher, batch, layers)
