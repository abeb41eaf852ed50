"""Which batch an engine has: rows with room for whole streams, or a pool of pages; and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from jax.typing import DTypeLike

from streamjax.kv.cache import Cache
from streamjax.kv.query import Implementation
from streamjax.models.decoder import Decoder
from streamjax.models.lora.row_adapters import Factors
from streamjax.serving.admission import nbytes, require_memory
from streamjax.serving.batch import Batch
from streamjax.serving.paging.paged_batch import PagedBatch, page_size_for
from streamjax.serving.paging.pooled_states import in_pool, keeps_all, split
from streamjax.streaming.state import init_state, layer_caches


def make_batch(
    model: Decoder,
    cache: Cache | Sequence[Cache],
    rows: int,
    chunk_size: int,
    block: int,
    dtype: DTypeLike | None,
    implementation: Implementation | None,
    adapters: Mapping[str, Factors],
    *,
    pool_tokens: int | None,
    prefix_bytes: int,
    conversation_bytes: int,
    memory_bytes: int | None,
) -> Batch:
    """The batch of an engine with these settings, see `Engine`.

    Raises:
      ValueError: a pool for a cache that has nothing to put there, or more than `memory_bytes`.
    """
    caches = layer_caches(model.config, cache)
    length = max((one.slots for one in caches if keeps_all(one)), default=0)
    if pool_tokens is not None and pool_tokens < 0:
        raise ValueError(f"pool_tokens must not be negative, got {pool_tokens}")
    if pool_tokens and not length:
        raise ValueError(
            f"pool_tokens is {pool_tokens}, and no layer keeps every token: streams have states of constant size"
        )
    pool_tokens = rows * length if pool_tokens is None else pool_tokens
    count = -(-pool_tokens // page_size_for(chunk_size))
    sizes = in_pool(caches, count, page_size_for(chunk_size)) if count else caches
    one, pools = split(jax.eval_shape(lambda: init_state(model, sizes, 1, dtype=dtype, note_used=True)))
    require_memory(rows, nbytes(one), nbytes(pools), prefix_bytes, conversation_bytes, memory_bytes)
    options = (model, cache, rows, chunk_size, block, dtype, implementation, adapters)
    return PagedBatch(*options, pages=count) if count else Batch(*options)
