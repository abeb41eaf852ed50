"""Short texts that tell models of one shape apart."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.models.decoder import Decoder


def fingerprint(model: Decoder) -> str:
    """A hash over a few numbers of the first and the last weights: tells models of one shape apart at no cost."""
    digest = hashlib.sha256(str(model.dtype).encode())
    for corner in _corners(model):
        digest.update(np.asarray(corner, np.float32).tobytes())
    return digest.hexdigest()[:16]


def fingerprint_in_any_dtype(model: Decoder) -> str:
    """The same of a model's weights rounded to bfloat16: one for a model in float32 and in bfloat16."""
    digest = hashlib.sha256()
    for corner in _corners(model):
        digest.update(np.asarray(jnp.asarray(corner, jnp.bfloat16), np.float32).tobytes())
    return digest.hexdigest()[:16]


def _corners(model: Decoder) -> list[jax.Array]:
    parts = (model.embedding, model.layer(0), model.layer(model.config.num_layers - 1), model.norm)
    return [leaf[(0,) * (leaf.ndim - 1)][:16] for leaf in jax.tree.leaves(parts)]
