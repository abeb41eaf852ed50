"""Where a model's numbers stop being numbers: a second look, taken only when something was seen that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from streamjax.checkpoints.pytrees import named_arrays
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds

_NEWEST = 64  # tokens that the second look reads


class NotFiniteError(ValueError):
    """A model computed NaN or infinity."""


def not_finite(
    model: Decoder, tokens: Sequence[int] | Int[np.ndarray, " T"], what: str = "the model's logits"
) -> NotFiniteError:
    """The error that says in one line where a model first went wrong.

    Args:
      model: the model.
      tokens: the newest ids that it read, as in `where_not_finite`.
      what: was seen to be not finite.
    """
    count = min(len(tokens), _NEWEST) or 1
    why = where_not_finite(model, tokens)
    why = why or f"the newest {count} tokens alone give none: what the cache holds is not finite"
    return NotFiniteError(f"{what} are not finite; {why}")


def where_not_finite(model: Decoder, tokens: Sequence[int] | Int[np.ndarray, " T"] = ()) -> str:
    """The first part of a model whose output is not finite, and why, in words; "" where all are.

    Args:
      model: the model.
      tokens: the last 64 of these ids are read, from the beginning of a sequence; where there are none, one id.
    """
    ids = np.asarray(tokens, np.int32).ravel()[-_NEWEST:]
    if not ids.size:
        ids = np.array([model.config.bos_token_id or 0], np.int32)
    place, part = _first(model, ids)
    damage = _damage(part)
    if place and damage:
        return f"first in {place}, where {damage}: the weights are damaged"
    if place:
        return f"first in {place}, whose weights are finite: values overflow {model.dtype}; try float32"
    damage = _damage(model)
    return damage and f"{damage}: the weights are damaged"


def damaged_weights(model: Decoder) -> str:
    """The first parameter of a model that is not finite, in words; "" where all are."""
    numbers = [leaf for leaf in named_arrays(model).values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return "" if bool(_all_finite(numbers)) else _damage(model)


@jax.jit
def _all_finite(arrays: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def _first(model: Decoder, ids: Int[np.ndarray, " T"]) -> tuple[str, object]:
    """The first part of the model whose output is not finite, in words and as a module; "" where all are."""
    model, tokens = with_bounds(model), jnp.asarray(ids)[None]
    x, memory = model.embed(tokens), None
    if not _finite(x):
        parts = "embedding", "embedding_norm", "layer_inputs"
        return "the embedding", {name: getattr(model, name) for name in parts}
    for i in range(model.config.num_layers):
        block = model.layer(i)
        x, memory = _through(block, x, memory)
        if not _finite(x):
            return f"layer {i} of {model.config.num_layers} (counted from 0)", block
    x = model.norm(x)
    if not _finite(x):
        return "the last norm", model.norm
    if not _finite(jnp.max(model.logits(x), axis=-1)):
        return "the head", {"embedding": model.embedding, "head": model.head, "head_bias": model.head_bias}
    return "", None


@jax.jit
def _through(block, x, memory):
    """A layer over a sequence; equal layers are one program."""
    length = x.shape[1]
    context = SequenceContext(jnp.arange(length, dtype=jnp.uint32)[None], None, length)
    return block.parallel(x, context, memory)


def _damage(part: object) -> str:
    """The first parameter of a part that has values which are not finite, in words; "" where none has."""
    for name, leaf in named_arrays(part).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _finite(leaf):
            count = int(jnp.sum(~jnp.isfinite(leaf)))
            return f"{name} has {count:,} of {leaf.size:,} values that are not finite"
    return ""


def _finite(x: Array) -> bool:
    return bool(jnp.isfinite(x).all())
