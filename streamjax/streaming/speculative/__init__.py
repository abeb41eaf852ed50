"""Speculative decoding without loss: tokens that are guessed by a drafter and read by the model in one pass."""

from streamjax.streaming.speculative.drafter import Drafter, Drafts
from streamjax.streaming.speculative.heads import Hydra, ParallelPrompts, trained_drafter
from streamjax.streaming.speculative.ngrams import NGrams
from streamjax.streaming.speculative.retrieval import Retrieval
from streamjax.streaming.speculative.small_model import SmallModel
from streamjax.streaming.speculative.verification import Verified, verify

__all__ = [
    "Drafter", "Drafts", "Hydra", "NGrams", "ParallelPrompts", "Retrieval", "SmallModel", "Verified", "trained_drafter",
    "verify",
]  # fmt: skip
