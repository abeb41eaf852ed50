"""`ParallelPrompts`: trained prompt tokens that let the model itself guess ahead (Chen et al., 2405.18628).

Behind each node of a tree of guesses the model reads M prompt tokens, whose embeddings were trained. What it says at
prompt token i behind a node is what it expects i tokens later than its own next token there. Whatever node a stream
comes to stand at, the next guesses are there already: they cost no other model and no pass of their own, but M tokens
of each pass for every node. Prompt tokens are never stored.

What differs from the paper: all nodes have all prompt tokens, each of which has one embedding, and guesses come from
frequent tokens (`vocabulary.py`). The tree is grown anew for each pass from what was said, where the paper's trees are
fixed by statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from streamjax.field_checks import Size
from streamjax.models.decoder import Decoder
from streamjax.streaming.speculative.drafter import Drafts, Draws
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from streamjax.streaming.speculative.heads.tree_drafter import Ahead, GrownTrees, TreeDrafter
from streamjax.streaming.speculative.heads.tree_growth import grow_tree
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary
from streamjax.streaming.speculative.history import History


@partial(jax.jit, static_argnames=("width", "nodes"))
def tree_of_prompts(
    model: Decoder,
    vocabulary: DraftVocabulary,
    ahead: Float[Array, "B M E"],
    certain: Int32[Array, " B"],
    width: int,
    nodes: int,
) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
    """`grow_tree` by the hidden states of the M prompt tokens behind the newest token that each stream has read."""
    logp = jax.nn.log_softmax(vocabulary.logits(model, ahead))

    def says(path: Int32[Array, "B P i"]) -> Float[Array, "B P V"]:
        rows, paths, read = path.shape
        return jnp.broadcast_to(logp[:, None, read - 1], (rows, paths, logp.shape[2]))

    return grow_tree(says, certain, vocabulary.ids, ahead.shape[1], width, nodes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptTrees(GrownTrees):
    """Trees by what was said at `length` prompt tokens."""

    def grow(
        self, model: Decoder, hidden: Float[Array, "B E"], ahead: Ahead, certain: Int32[Array, " B"]
    ) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
        assert ahead is not None
        return tree_of_prompts(model, self.vocabulary, ahead, certain, self.width, self.nodes)


@dataclasses.dataclass(kw_only=True)
class ParallelPrompts(TreeDrafter):
    """Trained prompt tokens that guess; see `python -m train.draft_heads --kind=ppd`.

    Args:
      model: whom they guess for.
      heads: what was trained for it, or the file that has it.
      length: tokens of one way to go on; as many as there are prompt tokens where there are fewer.
      width: guesses of each level that others may follow.
      size: guesses that are kept of all levels. A pass reads (1 + size) (1 + length) tokens.

    Raises:
      ValueError: no such file, or prompt tokens of another model.

    Example:
      >>> draft = ParallelPrompts(model=model, heads="prompts.safetensors")
      >>> session = sj.Session(model, tokenizer, sj.kv.preset("streaming_llm"), draft=draft)
    """

    heads: PromptTokens | str | Path
    length: Size = 2
    width: Size = 2
    size: Size = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads = heads = self.heads if isinstance(self.heads, PromptTokens) else PromptTokens.load(self.heads)
        self.take_up(heads, len(heads.prompts), "prompt tokens")
        self._prompts = jnp.asarray(heads.prompts[: self.length])

    @property
    def pass_width(self) -> int:
        return (1 + self.nodes) * (1 + self.length)

    @property
    def prompts(self) -> Float[Array, "M E"]:
        return self._prompts[: self.length]

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        if draws.ahead is not None:
            return super().propose(streams, wanted, draws)
        none = np.zeros((len(streams), self.nodes), np.int32)  # no pass has read prompt tokens here: this one does
        return Drafts(none, np.zeros(len(streams), np.int32), none)

    @property
    def trees(self) -> PromptTrees:
        return PromptTrees(self._vocabulary, self.length, self.width, self.nodes)
