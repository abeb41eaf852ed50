"""The streaming loop: state, step, scoring, generation."""

from streamjax.streaming.compacting.compact import compact, lazy_layers, reconstruction
from streamjax.streaming.compacting.measure_budget import measure_budget
from streamjax.streaming.compacting.measure_codebooks import measure_codebooks
from streamjax.streaming.compacting.measure_factors import measure_factors
from streamjax.streaming.compacting.measure_filters import measure_filters
from streamjax.streaming.generate import generate, generate_blocks
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.scan import read, read_prefix, score
from streamjax.streaming.state import StreamState, init_state, layer_caches
from streamjax.streaming.step import advance, step

__all__ = [
    "Sampler",
    "StreamState",
    "advance",
    "compact",
    "generate",
    "generate_blocks",
    "init_state",
    "layer_caches",
    "lazy_layers",
    "measure_budget",
    "measure_codebooks",
    "measure_factors",
    "measure_filters",
    "read",
    "read_prefix",
    "reconstruction",
    "score",
    "step",
]
