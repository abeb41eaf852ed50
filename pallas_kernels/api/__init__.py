"""The kernels' public functions: one each, whatever the platform.

`implementation` names a kernel's backend: "tpu" (Mosaic) or "triton" (NVIDIA GPUs, Ampere and later). None takes the
one of the platform that JAX runs on. "mosaic_gpu" (Hopper) is a backend of `flash_attention` that is taken by its name
alone. `platforms` says which arguments a platform's kernels take. The XLA twins, which run anywhere, are in
`streamjax`: of attention in `streamjax.attention`, of losses in `streamjax.training`. So is the choice between them and
these.
"""

from pallas_kernels.api import platforms
from pallas_kernels.api.caches import (
    MOST_READERS,
    decode_attention,
    pack_int4,
    page_scores,
    paged_attention,
    pool_attention,
    shared_pool_attention,
)
from pallas_kernels.api.losses import LogitStats, token_stats, token_stats_gradients
from pallas_kernels.api.platforms import Implementation
from pallas_kernels.api.recurrence import chunkwise_recurrence, delta_update
from pallas_kernels.api.sequences import chunk_attention, chunk_gradients, flash_attention, hsa_attention
from pallas_kernels.api.weights import grouped_product
from pallas_kernels.coded import Coded
from pallas_kernels.unpacking.protocol import Unpackable

__all__ = [
    "MOST_READERS",
    "Coded",
    "Implementation",
    "LogitStats",
    "Unpackable",
    "chunk_attention",
    "chunk_gradients",
    "chunkwise_recurrence",
    "decode_attention",
    "delta_update",
    "flash_attention",
    "grouped_product",
    "hsa_attention",
    "pack_int4",
    "page_scores",
    "paged_attention",
    "platforms",
    "pool_attention",
    "shared_pool_attention",
    "token_stats",
    "token_stats_gradients",
]
