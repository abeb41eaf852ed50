"""MatryoshkaKV (Lin et al., arXiv 2410.14731): every token, in directions that are trained for each head.

The published rule: each head's keys and values are projected by an orthogonal matrix, which begins as the principal
directions of a text and is trained, by distillation with a rank drawn for every head, to say most in its first
directions; a greedy search gives each head a rank of its own. `projections` names the file, which
`python -m train.projections` writes. Here keys are projected before rotation and rotated again when they are read,
where the paper's are projected rotated; no mean is taken off; the newest `window` tokens stay whole. What is stored
does not depend on how a stream is cut.
"""

from pathlib import Path

from streamjax.field_checks import Fraction, Size
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.low_rank import LowRank
from streamjax.kv.channels.projection_file import HeadProjections, Projections
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.window import Window


@register(
    paper="MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection, arXiv 2410.14731",
    needs=("projections",),
)
def matryoshka_kv(
    projections: str | Path = "", keys: Fraction = 0.0, values: Fraction = 0.0, window: Size = 32, capacity: Size = 4096
) -> tuple[Cache, ...]:
    """Keep every token up to `capacity`, older ones in trained directions: of each head as many as a search gave it."""
    if not projections:
        raise ValueError("matryoshka_kv needs trained directions: give projections=FILE (train.projections)")
    file = HeadProjections.load(projections)

    def cache(layer: Projections | tuple[str, int]) -> Cache:
        if isinstance(layer, Projections):
            own, shares = layer.factors(file.model, (keys, values))
            return Cascade(Window(window), LowRank(capacity, *shares, factors=own))
        kind, bound = layer
        return CurrentChunk(bound) if kind == "chunk" else Cascade(Window(bound - 1))

    return tuple(map(cache, file.layers))
