"""`measure_filters`: where the queries of a model's heads point, on a text (Q-Filters, Godey et al., 2503.02812)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from streamjax.kv.scores.filter_file import QueryFilters
from streamjax.kv.scores.query_filters import Filters
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.streaming.rows import Rows, as_rows, require_ids, require_one_length
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype


def measure_filters(model: Decoder, text: Rows) -> QueryFilters:
    """The filter of every key head: the first right singular vector of its queries, towards where most of them point.

    Queries are rotated; heads that share a key head have the mean of theirs. The paper reads 20 texts of 2,048 tokens.

        sj.measure_filters(model, ids).save("filters.safetensors")   # then --cache=qfilters:filters=filters.safetensors

    Args:
      model: whose queries are read.
      text: ids, rows of one length, of at least two tokens; each is read by itself, from position 0.

    Raises:
      ValueError: rows that are not as described, or a layer that is no attention with heads of its own.
    """
    ids, lengths = as_rows(text)
    require_one_length(lengths, "filters need", least=2)
    require_ids(ids, lengths, model.config.vocab_size)
    x, context = model.embed(jnp.asarray(ids, jnp.int32)), SequenceContext.from_start(*ids.shape)
    own = fingerprint_in_any_dtype(model)
    layers: list[Filters | tuple[str, int]] = []
    for i, config in enumerate(model.config.blocks):
        mixer, block = config.mixer, model.layer(i)
        if not isinstance(mixer, AttentionConfig):
            raise ValueError(f"layer {i} has no heads whose keys could be filtered: {type(mixer).__name__}")
        bound = ("chunk", mixer.chunk) if mixer.chunk is not None else ("window", mixer.window)
        if bound[1] is None:
            q, k, _ = block.project(x, context)
            found = _filters(np.asarray(q, np.float64), k.shape[2])
            layers.append(Filters(found.astype(np.float32).tobytes(), len(found), own))
        else:
            layers.append((bound[0], int(bound[1])))
        x, _ = block.parallel(x, context)
    return QueryFilters(tuple(layers), own, ids.size)


def _filters(q: np.ndarray, key_heads: int) -> np.ndarray:
    """[K, D] from rotated queries [B, T, H, D]."""
    by_head = rearrange(q, "b t h d -> h (b t) d")
    first = np.linalg.eigh(by_head.swapaxes(1, 2) @ by_head)[1][..., -1]
    along = np.einsum("htd,hd->ht", by_head, first)
    side: np.ndarray = np.mean(np.sign(along), axis=1)
    side = np.where(side == 0, np.mean(along, axis=1), side)  # the mean decides between halves
    return rearrange(first * np.where(side > 0, 1, -1)[:, None], "(k g) d -> k g d", k=key_heads).mean(axis=1)
