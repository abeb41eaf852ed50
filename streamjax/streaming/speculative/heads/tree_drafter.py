"""`TreeDrafter`: what trained drafters share, who guess trees of a model's frequent tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from streamjax.field_checks import Size
from streamjax.models.decoder import Decoder
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative.drafter import Drafter, Drafts, Draws
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary
from streamjax.streaming.speculative.history import History

Ahead = Float[Array, "B M E"] | None  # what a model says at prompt tokens behind its streams


@dataclasses.dataclass(frozen=True)
class GrownTrees:
    """A rule that grows trees of guesses on the device. Subclasses are pytrees: their arrays are data of programs.

    vocabulary: what is guessed. length: levels of a tree. width: guesses of each level that others may follow. nodes:
    guesses of a tree.
    """

    vocabulary: DraftVocabulary
    length: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    nodes: int = dataclasses.field(metadata={"static": True})

    def grow(
        self, model: Decoder, hidden: Float[Array, "B E"], ahead: Ahead, certain: Int32[Array, " B"]
    ) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
        """The guesses behind each stream's certain token, and their parents (`grow_tree`).

        Args:
          model: whom they are for.
          hidden: its states behind the newest token that each stream has read.
          ahead: the same at prompt tokens behind that one, where the rule has any.
          certain: what each stream reads next.
        """
        raise NotImplementedError

    def chains(self) -> GrownTrees:
        """The rule that guesses a single way to go on."""
        return dataclasses.replace(self, width=1, nodes=self.length)


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
        self._vocabulary = DraftVocabulary.from_model(self.model, jnp.asarray(trained.ids))

    @property
    def guesses_trees(self) -> bool:
        return True

    def smaller(self) -> Drafter | None:
        less = self.nodes - 1
        return None if not less else self._with(size=less, length=min(self.length, less), width=min(self.width, less))

    def held_bytes(self, rows: int, model: Decoder) -> tuple[int, int]:
        prompts = 0 if self.prompts is None else self.prompts.size
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves((self.trees, self.prompts)))
        return weights, rows * prompts * model.dtype.itemsize

    @property
    def nodes(self) -> int:
        return min(self.size, self.width * self.length)

    @property
    def trees(self) -> GrownTrees:
        """How it guesses."""
        raise NotImplementedError

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        certain = np.array([stream.tokens[-1] for stream in streams], np.int32)
        tokens, parents = self.trees.grow(self.model, draws.hidden, draws.ahead, jnp.asarray(certain))
        count = np.where(wanted, self.nodes, 0).astype(np.int32)
        return Drafts(np.asarray(tokens), count, np.asarray(parents))
