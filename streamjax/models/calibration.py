"""What a decoder's output matrix meets, measured without data: hidden states of tokens that are drawn.

A model's last hidden states are far from alike in all directions. In SmolLM2-135M two thirds of their power is their
mean, half of it in six channels. Four bits of the output matrix are chosen by that (`streamjax.models.rounding`). The
matrix is the largest of a small model and decides every token; what other kernels meet is not measured.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import without_layers
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.models.mixers.hierarchical import ReadablePages
from streamjax.parallel.mesh import make_mesh

_ROWS, _LENGTH = 2, 128  # of drawn tokens
_DAMPING = 0.05  # of the mean power of a channel, added to all: drawn tokens are no text


def output_moments(model: Decoder, rows: Callable[[np.ndarray], Float[np.ndarray, "N E"]]) -> Float[np.ndarray, "E E"]:
    """Second moments of the hidden states that the output matrix is multiplied by, over drawn tokens.

    Layers run one after the other on one device, so that a model gives the same on any mesh. Where a layer lies on
    several hosts, or a hidden state is not finite, they are the squares of the last norm's factors.

    Args:
      model: its layers, its norms and layers' inputs are used, and neither embedding nor output matrix.
      rows: the embeddings of token ids [N].
    """
    factors = np.ones(model.config.d_model, np.float32)
    if model.norm.weight is not None:
        factors = np.asarray(model.norm.weight.get_value(), np.float32) + model.norm.offset
    usual = np.diag(np.square(factors))
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves((model.stack, model.layers))):
        return usual
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, _ROWS * _LENGTH)
    embedded, device = rows(ids).reshape(_ROWS, _LENGTH, -1), jax.local_devices()[0]
    model = with_bounds(model)
    with jax.set_mesh(make_mesh(devices=[device])):
        ends = without_layers(model)  # its embedding or output matrix may not be there yet
        ends.embedding_norm, ends.layer_inputs = jax.device_put((ends.embedding_norm, ends.layer_inputs), device)
        x = jax.device_put(jnp.asarray(embedded, model.dtype), device)
        x, memory = ends.enter(x, jnp.asarray(ids, jnp.int32).reshape(_ROWS, _LENGTH)), None
        for index in range(model.config.num_layers):
            found = _through(jax.device_put(model.layer(index), device), x, memory)
            x, memory = jax.block_until_ready(found)  # one layer's memory at a time
        hidden = np.asarray(jax.device_put(model.norm, device)(x), np.float32).reshape(len(ids), -1)
    moments = hidden.T @ hidden / len(ids)
    return moments if np.isfinite(moments).all() and moments.any() else usual


@jax.jit
def _through(block: Block, x: Array, memory: ReadablePages | None) -> tuple[Array, ReadablePages | None]:
    return block.parallel(x, SequenceContext.from_start(*x.shape[:2]), memory)


def output_factor(model: Decoder, rows: Callable[[np.ndarray], Float[np.ndarray, "N E"]]) -> Float[np.ndarray, "E E"]:
    """The factor of `rounding.quantise` for a model's output matrix; arguments as of `output_moments`."""
    return error_factor(output_moments(model, rows))


def error_factor(moments: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """The upper triangular factor of the inverse of second moments, by which errors are spread along a row."""
    damped = moments.astype(np.float64)
    damped[np.diag_indices_from(damped)] += _DAMPING * damped.diagonal().mean()
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
