"""The attention layers of a model, read one behind the other over a text, and what is measured of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.nonfinite import not_finite
from streamjax.streaming.token_rows import Rows, as_rows, require_ids, require_one_length

T = TypeVar("T")


def measure_layers(
    model: Decoder,
    text: Rows,
    measure: Callable[[Block, AttentionConfig, Float[Array, "B T E"], SequenceContext], T],
    *,
    needs: str,
    lacks: str,
) -> tuple[tuple[T | tuple[str, int], ...], int]:
    """What is measured of each layer's inputs, or ("window", W) or ("chunk", C) of one that sees no more; and tokens.

    Args:
      model: whose layers are read.
      text: ids, rows of one length, of at least two tokens; each is read by itself, from position 0.
      measure: called with a layer, its attention's config, and what it reads, where nothing bounds that.
      needs: such as "filters need", for the error about rows.
      lacks: such as "keys could be filtered": what only heads of a layer's own allow.

    Raises:
      ValueError: rows that are not as described, or a layer that is no attention with heads of its own.
      NotFiniteError: what the model makes of the text is not finite.
    """
    ids, lengths = as_rows(text)
    require_one_length(lengths, needs, least=2)
    require_ids(ids, lengths, model.config.vocab_size)
    x, context = model.embed(jnp.asarray(ids, jnp.int32)), SequenceContext.from_start(*ids.shape)
    layers: list[T | tuple[str, int]] = []
    for i, config in enumerate(model.config.blocks):
        mixer, block = config.mixer, model.layer(i)
        if not isinstance(mixer, AttentionConfig):
            raise ValueError(f"layer {i} has no heads whose {lacks}: {type(mixer).__name__}")
        bound = mixer.bound
        layers.append(measure(block, mixer, x, context) if bound is None else bound)
        x = _next(block, x, context)
        if not bool(jnp.isfinite(x).all()):  # before the next layer's measure meets it
            raise not_finite(model, ids[0], "the model's hidden states")
    return tuple(layers), ids.size


@jax.jit
def _next(block: Block, x: Float[Array, "B T E"], context: SequenceContext) -> Float[Array, "B T E"]:
    return block.parallel(x, context)[0]
