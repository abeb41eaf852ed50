"""`measure_factors`: the directions of a model's keys and values, on a text (CSKV, Wang et al., 2409.10593)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.kv.channels.factor_file import LayerFactors
from streamjax.kv.channels.low_rank import Factors
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import Attention, SequenceContext
from streamjax.streaming.compacting.attention_layers import measure_layers
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.token_rows import Rows


def measure_factors(model: Decoder, text: Rows, most: float = 0.5) -> LayerFactors:
    """Of every layer the directions that hold most of the squares of its keys, before rotation, and of its values.

    They are the least-squares answer to what CSKV trains its factors for: `x A B` nearest to the keys or values of the
    text, over all inputs x. Directions span the channels of all key heads of a layer.

    Args:
      model: whose keys and values are read.
      text: ids, rows of one length; each is read by itself, from position 0.
      most: how many directions are kept, as a share of all.

    Raises:
      ValueError: rows that are not as described or fewer tokens than directions, a share that is none, or a layer that
        is no attention with heads of its own.

    Example:
      >>> sj.measure_factors(model, prompt).save("factors.safetensors")
      >>> cache = sj.kv.preset("cskv", factors="factors.safetensors")  # --cache=cskv:factors=FILE
    """
    if not 0 < most <= 1:
        raise ValueError(f"measure_factors: most is {most}: it must be a number above 0 and at most 1, a share")
    own = fingerprint_in_any_dtype(model)

    def measure(block: Block, mixer: AttentionConfig, x: Float[Array, "B T E"], context: SequenceContext) -> Factors:
        made = [_directions(np.asarray(found, np.float64), most, mixer.num_kv_heads) for found in _squares(block, x)]
        tokens = x.shape[0] * x.shape[1]
        if tokens < (rank := made[0].shape[1]):
            raise ValueError(f"{tokens} tokens have no {rank} directions: give a longer text, or a smaller most")
        return Factors(made[0].tobytes(), made[1].tobytes(), len(made[0]), own)

    layers, tokens = measure_layers(model, text, measure, needs="factors need", lacks="keys could be shortened")
    return LayerFactors(layers, own, tokens)


@jax.jit
def _squares(block: Block, x: Float[Array, "B T E"]) -> list[Float[Array, "M M"]]:
    """Of keys before rotation and of values, all heads' channels side by side, the sum of their outer products."""
    assert isinstance(block.mixer, Attention)
    lines = [
        rearrange(part, "b t k d -> (b t) (k d)").astype(jnp.float32)
        for part in block.mixer.projections.keys(block.mixer_input(x))
    ]
    return [jnp.einsum("tm,tn->mn", line, line, precision="highest") for line in lines]


def _directions(squares: Float[np.ndarray, "M M"], most: float, heads: int) -> Float[np.ndarray, "M R"]:
    rank = math.ceil(most * len(squares) / heads) * heads
    return np.ascontiguousarray(np.linalg.eigh(squares)[1][:, ::-1][:, :rank], np.float32)
