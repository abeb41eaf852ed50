"""`TreeDrafter`: what trained drafters share, who guess trees of a model's frequent tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from streamjax.field_checks import Size
from streamjax.models.decoder import Decoder
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative.drafter import Drafter, Drafts, Draws
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary
from streamjax.streaming.speculative.history import History


@dataclasses.dataclass(kw_only=True)
class TreeDrafter(Drafter):
    """Grows a tree of guesses for each stream by what was trained for its model.

    Args:
      model: whom it guesses for.
      width: guesses of each level that others may follow.
      size: guesses that are kept of all levels.
    """

    model: Decoder
    width: Size
    size: Size

    def take_up(self, trained: Any, levels: int, what: str) -> None:
        """Guess by what was trained, of which a tree can have so many levels.

        Raises:
          ValueError: it was trained for another model.
        """
        if trained.model != fingerprint_in_any_dtype(self.model):
            raise ValueError(f"these {what} were trained for another model")
        self.length, self.width = min(self.length, levels), min(self.width, len(trained.ids))
        self._vocabulary = DraftVocabulary.of(self.model, jnp.asarray(trained.ids))

    @property
    def nodes(self) -> int:
        return min(self.size, self.width * self.length)

    def grow(self, draws: Draws, certain: Int32[Array, " B"]) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
        """The guesses behind each stream's certain token, and their parents (`grow_tree`)."""
        raise NotImplementedError

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        certain = np.array([stream.tokens[-1] for stream in streams], np.int32)
        tokens, parents = self.grow(draws, jnp.asarray(certain))
        count = np.where(wanted, self.nodes, 0).astype(np.int32)
        return Drafts(np.asarray(tokens), count, np.asarray(parents))
