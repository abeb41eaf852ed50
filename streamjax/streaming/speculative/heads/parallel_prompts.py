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
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative.drafter import Drafter, Drafts, Draws
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
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


@dataclasses.dataclass(kw_only=True)
class ParallelPrompts(Drafter):
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
      >>> state, tokens = sj.generate(model, state, prompt, max_new_tokens=64, sampler=greedy, draft=draft)
    """

    model: Decoder
    heads: PromptTokens | str | Path
    length: Size = 2
    width: Size = 2
    size: Size = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.heads if isinstance(self.heads, PromptTokens) else PromptTokens.load(self.heads)
        if heads.model != fingerprint_in_any_dtype(self.model):
            raise ValueError("these prompt tokens were trained for another model")
        self.heads, self.length = heads, min(self.length, len(heads.prompts))
        self.width = min(self.width, len(heads.ids))
        self._prompts = jnp.asarray(heads.prompts[: self.length])
        self._vocabulary = DraftVocabulary.of(self.model, jnp.asarray(heads.ids))

    @property
    def nodes(self) -> int:
        return min(self.size, self.width * self.length)

    @property
    def pass_width(self) -> int:
        return (1 + self.nodes) * (1 + self.length)

    @property
    def prompts(self) -> Float[Array, "M E"]:
        return self._prompts

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        shape = (len(streams), self.nodes)
        if draws.ahead is None:  # no pass has read prompt tokens where the streams stand: this one does
            return Drafts(np.zeros(shape, np.int32), np.zeros(len(streams), np.int32), np.zeros(shape, np.int32))
        certain = np.array([stream.tokens[-1] for stream in streams], np.int32)
        tokens, parents = tree_of_prompts(
            self.model, self._vocabulary, draws.ahead, jnp.asarray(certain), self.width, self.nodes
        )
        count = np.where(wanted, self.nodes, 0).astype(np.int32)
        return Drafts(np.asarray(tokens), count, np.asarray(parents))
