"""The part of a model's vocabulary that trained heads guess from: frequent tokens (FR-Spec, 2502.14856).

A head says how probable each token is by the model's own matrix, which for a small model is a fifth of its weights.
Few of its rows are ever guessed right, so heads read those of frequent tokens alone. What the model itself may say is
not touched by that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from streamjax.models.decoder import Decoder
from streamjax.models.parameters import product
from streamjax.models.quantisation import take_rows


class DraftVocabulary(NamedTuple):
    """Tokens that are guessed, and the model's rows that say how probable they are; bias where the model has one."""

    ids: Int32[Array, " V"]
    rows: Float[Array, "V E"]
    bias: Float[Array, " V"] | None

    @classmethod
    def from_model(cls, model: Decoder, ids: Int[Array, " V"]) -> DraftVocabulary:
        """The rows of these ids, in the dtype of the model's activations."""
        ids = jnp.asarray(ids, jnp.int32)
        if model.head is None:
            rows = take_rows(model.embedding[...], ids, model.dtype)
        else:  # a product, since weights may be quantised
            whole = product("bte,ev->btv", jnp.eye(model.config.d_model, dtype=model.dtype)[None], model.head[...])[0]
            rows = jnp.take(whole, ids, axis=1).T
        bias = None if model.head_bias is None else jnp.take(model.head_bias[...], ids)
        return cls(ids, rows, bias)

    def logits(self, model: Decoder, hidden: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """What `Decoder.logits` says of these tokens, float32."""
        rows, softcap = self.rows, model.config.logit_softcap
        logits = jnp.einsum("...e,ve->...v", hidden.astype(rows.dtype), rows, preferred_element_type=jnp.float32)
        if self.bias is not None:
            logits = logits + self.bias.astype(jnp.float32)
        logits = logits * model.config.logit_scale
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def read_ids(file: Any) -> Int32[np.ndarray, " V"]:
    """The ids of an opened file of trained drafts.

    Raises:
      ValueError: no list that rises.
    """
    ids = np.ascontiguousarray(file.get_tensor("ids"))
    if ids.ndim != 1 or ids.dtype != np.int32 or not len(ids) or (np.diff(ids) <= 0).any():
        raise ValueError("it needs a list of ids that rises")
    return ids


def embedded(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """Embeddings as heads read them: of mean square 1, float32."""
    return unit(model.embed(tokens)[..., : model.config.d_model])


def unit(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Vectors of mean square 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
