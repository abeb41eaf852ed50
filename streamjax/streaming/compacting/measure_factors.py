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
from streamjax.streaming.rows import Rows, as_rows, require_ids, require_one_length
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype


def measure_factors(model: Decoder, text: Rows, most: float = 0.5) -> LayerFactors:
    """Of every layer the directions that hold most of the squares of its keys, before rotation, and of its values.

    They are the least-squares answer to what CSKV trains its factors for: `x A B` nearest to the keys or values of the
    text, over all inputs x. Directions span the channels of all key heads of a layer.

        sj.measure_factors(model, ids).save("factors.safetensors")   # then --cache=cskv:factors=factors.safetensors

    Args:
      model: whose keys and values are read.
      text: ids, rows of one length; each is read by itself, from position 0.
      most: how many directions are kept, as a share of all.

    Raises:
      ValueError: rows that are not as described or fewer tokens than directions, a share that is none, or a layer that
        is no attention with heads of its own.
    """
    ids, lengths = as_rows(text)
    require_one_length(lengths, "factors need", least=2)
    require_ids(ids, lengths, model.config.vocab_size)
    if not 0 < most <= 1:
        raise ValueError(f"measure_factors: most is {most}: it must be a number above 0 and at most 1, a share")
    x, context = model.embed(jnp.asarray(ids, jnp.int32)), SequenceContext.from_start(*ids.shape)
    own = fingerprint_in_any_dtype(model)
    layers: list[Factors | tuple[str, int]] = []
    for i, config in enumerate(model.config.blocks):
        mixer, block = config.mixer, model.layer(i)
        if not isinstance(mixer, AttentionConfig):
            raise ValueError(f"layer {i} has no heads whose keys could be shortened: {type(mixer).__name__}")
        bound = ("chunk", mixer.chunk) if mixer.chunk is not None else ("window", mixer.window)
        if bound[1] is None:
            made = [
                _directions(np.asarray(found, np.float64), most, mixer.num_kv_heads) for found in _squares(block, x)
            ]
            if ids.size < (rank := made[0].shape[1]):
                raise ValueError(f"{ids.size} tokens have no {rank} directions: give a longer text, or a smaller most")
            layers.append(Factors(made[0].tobytes(), made[1].tobytes(), len(made[0]), own))
        else:
            layers.append((bound[0], int(bound[1])))
        x = _next(block, x, context)
    return LayerFactors(tuple(layers), own, ids.size)


@jax.jit
def _squares(block: Block, x: Float[Array, "B T E"]) -> list[Float[Array, "M M"]]:
    """Of keys before rotation and of values, all heads' channels side by side, the sum of their outer products."""
    assert isinstance(block.mixer, Attention)
    lines = [
        rearrange(part, "b t k d -> (b t) (k d)").astype(jnp.float32)
        for part in block.mixer.projections.keys(block.mixer_input(x))
    ]
    return [jnp.einsum("tm,tn->mn", line, line, precision="highest") for line in lines]


@jax.jit
def _next(block: Block, x: Float[Array, "B T E"], context: SequenceContext) -> Float[Array, "B T E"]:
    return block.parallel(x, context)[0]


def _directions(squares: Float[np.ndarray, "M M"], most: float, heads: int) -> Float[np.ndarray, "M R"]:
    rank = math.ceil(most * len(squares) / heads) * heads
    return np.ascontiguousarray(np.linalg.eigh(squares)[1][:, ::-1][:, :rank], np.float32)
