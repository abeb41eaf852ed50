"""Measuring streams: what a cache costs and what a model makes of a text under it."""

from typing import TYPE_CHECKING, Any

from streamjax.byte_units import human_bytes
from streamjax.data.text.stream_encoder import StreamEncoder
from streamjax.evaluation.cache_trial import Part, Trial, run_trial
from streamjax.evaluation.curves import Curve, log_bins
from streamjax.evaluation.memory import SlotMemory, peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from streamjax.evaluation.perplexity_plot import plot_trials


def __getattr__(name: str) -> Any:
    if name == "plot_trials":  # on first use: matplotlib takes its time
        from streamjax.evaluation.perplexity_plot import plot_trials

        return plot_trials
    raise AttributeError(f"module 'streamjax.evaluation' has no attribute {name!r}")


__all__ = [
    "Curve",
    "Part",
    "SlotMemory",
    "StreamEncoder",
    "Trial",
    "human_bytes",
    "log_bins",
    "peak_resident_bytes",
    "plot_trials",
    "resident_bytes",
    "run_trial",
]
