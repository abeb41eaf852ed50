"""How much memory guesses take, counted before any of it is allocated, and how many of them fit into a budget."""

from streamjax.streaming.speculative.memory.plan import DraftMemory, fitted
from streamjax.streaming.speculative.memory.stream_passes import fit_draft

__all__ = ["DraftMemory", "fit_draft", "fitted"]
