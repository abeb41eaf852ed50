"""`measure_filters`: where the queries of a model's heads point, on a text (Q-Filters, Godey et al., 2503.02812)."""

from __future__ import annotations

import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.kv.scores.filter_file import QueryFilters
from streamjax.kv.scores.query_filters import Filters
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.streaming.compacting.attention_layers import measure_layers
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.token_rows import Rows


def measure_filters(model: Decoder, text: Rows) -> QueryFilters:
    """The filter of every key head: the first right singular vector of its queries, towards where most of them point.

    Queries are rotated; heads that share a key head have the mean of theirs. The paper reads 20 texts of 2,048 tokens.

    Args:
      model: whose queries are read.
      text: ids, rows of one length, of at least two tokens; each is read by itself, from position 0.

    Raises:
      ValueError: rows that are not as described, or a layer that is no attention with heads of its own.

    Example:
      >>> sj.measure_filters(model, prompt).save("filters.safetensors")
      >>> cache = sj.kv.preset("qfilters", filters="filters.safetensors")  # --cache=qfilters:filters=FILE
    """
    own = fingerprint_in_any_dtype(model)

    def measure(block: Block, mixer: AttentionConfig, x: Float[Array, "B T E"], context: SequenceContext) -> Filters:
        found = _filters(np.asarray(block.project(x, context)[0], np.float64), mixer.num_kv_heads)
        return Filters.from_arrays(found, model=own)

    layers, tokens = measure_layers(model, text, measure, needs="filters need", lacks="keys could be filtered")
    return QueryFilters(layers, own, tokens)


def _filters(q: np.ndarray, key_heads: int) -> np.ndarray:
    """[K, D] from rotated queries [B, T, H, D]."""
    by_head = rearrange(q, "b t h d -> h (b t) d")
    first = np.linalg.eigh(by_head.swapaxes(1, 2) @ by_head)[1][..., -1]
    along = np.einsum("htd,hd->ht", by_head, first)
    side: np.ndarray = np.mean(np.sign(along), axis=1)
    side = np.where(side == 0, np.mean(along, axis=1), side)  # the mean decides between halves
    return rearrange(first * np.where(side > 0, 1, -1)[:, None], "(k g) d -> k g d", k=key_heads).mean(axis=1)
