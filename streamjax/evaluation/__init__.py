"""Measuring streams: what a cache costs and what a model makes of a text under it."""

from streamjax.evaluation.compare import Part, Trial, run_trial
from streamjax.evaluation.curve import Curve, log_bins
from streamjax.evaluation.encode_stream import StreamEncoder
from streamjax.evaluation.memory import SlotMemory, peak_resident_bytes, resident_bytes
from streamjax.evaluation.plot import plot_trials

__all__ = [
    "Curve",
    "Part",
    "SlotMemory",
    "StreamEncoder",
    "Trial",
    "log_bins",
    "peak_resident_bytes",
    "plot_trials",
    "resident_bytes",
    "run_trial",
]
