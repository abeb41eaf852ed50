"""Hierarchical sparse attention (Hu et al., arXiv 2504.16795; HSA-UltraLong, arXiv 2511.23319): the chunk memory.

For models that were trained with it (`ModelConfig.hsa`). Pages of the model's `chunk_size` (the papers call them
chunks) are encoded by the model when they are full; a token reads the `top_k` pages whose landmarks promise most, for
each key head. The papers keep every page; here the oldest make room beyond `capacity` tokens. The model's own sliding
windows stay as they are.
"""

from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.landmark_memory import ChunkMemory


@register(paper="Every Token Counts: Generalizing 16M Ultra-Long Context in Large Language Models, arXiv 2511.23319")
def hsa(capacity: int = 131072, top_k: int = 0) -> ChunkMemory:
    """Remember the newest `capacity` tokens in encoded pages; each token reads `top_k` of them (0: as trained)."""
    return ChunkMemory(capacity, top_k)
