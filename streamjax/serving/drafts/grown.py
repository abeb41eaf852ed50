"""Guesses that are grown on the device: trees behind the tokens that rows draw, in the program that draws them.

Hydra's heads and parallel prompts guess from what the model has computed, so nothing comes from the host but how far
each row may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from streamjax.attention.token_tree import TokenTree
from streamjax.kv.cache import Cache
from streamjax.models.decoder import Decoder
from streamjax.serving.decoding import Drawn, draw, goes_on, no_choices, noted, put_choice
from streamjax.serving.drafts.walking import go_along
from streamjax.serving.row_sampling import RowSampling
from streamjax.streaming.speculative.heads.tree_drafter import GrownTrees, TreeDrafter
from streamjax.streaming.speculative.tree_verification import with_prompts
from streamjax.streaming.speculative.two_phases import (
    NO_TREES,
    allowed_levels,
    harmless,
    look_ahead,
    look_ahead_in_tree,
    take_in_first,
    takes_trees,
    waiting_along,
)
from streamjax.streaming.state import StreamState


@partial(jax.jit, donate_argnames=("state", "rows", "ahead"))
def decode_grown(
    model: Decoder,
    state: StreamState,
    rows: RowSampling,
    active: Bool[Array, " B"],
    most: Int32[Array, " B"],
    trees: GrownTrees,
    prompts: Float[Array, "M E"] | None,
    ahead: Float[Array, "B M E"] | None,
) -> tuple[StreamState, RowSampling, Drawn, Float[Array, "B M E"] | None]:
    """Draw and read a token of each row that is `active`, and behind it those guesses that the row would draw itself.

    What rows draw is what `decode_rows` draws, as in `decode_guessed`.

    Args:
      model, state, rows, active: as there.
      most: tokens that each row may read; where it is 1 or less, one.
      trees: who guesses. Where the model takes no trees, they are chains.
      prompts: embeddings of prompt tokens that are read behind each node, where the rule has any.
      ahead: what the model has said there in the last pass; it means nothing in rows that may read one token.

    Returns:
      The state, the rows, what was drawn, and what was said at the prompt tokens behind it.
    """
    assert state.used is not None  # an engine's states note what they have read
    every, levels = jnp.arange(active.shape[0]), 1 + trees.length
    logits = model.logits(state.hidden[:, None])[:, 0]
    first, alive, bad = draw(logits, rows, state.used, active & (rows.remaining > 0))
    rows = noted(rows, first.token, alive)
    on = goes_on(rows, first.token, alive)
    guesses, parents = trees.grow(model, state.hidden, ahead, first.token)
    tokens = jnp.concatenate((first.token[:, None], guesses), axis=1)
    parents = jnp.pad(parents, ((0, 0), (1, 0)))
    tree = TokenTree.from_parents(parents, jnp.broadcast_to(alive[:, None], tokens.shape), levels)
    tree = tree.cut(jnp.where(on, jnp.clip(most, 1, 1 + rows.remaining), 1))
    trees_too = takes_trees(model, state.caches)
    if trees_too:
        tree = tree.cut(allowed_levels(state, levels))
        if prompts is None:
            hidden, waiting = look_ahead_in_tree(model, state, tokens, tree)
        else:
            hidden, waiting = look_ahead_in_tree(model, state, *with_prompts(model, tokens, tree, prompts))
        there = tree.given
    else:
        given = harmless(model, state, jnp.sum(tree.given, axis=1, dtype=jnp.int32))
        hidden, waiting = look_ahead(model, state, tokens, given)
        there = jnp.arange(tokens.shape[1]) < given[:, None]
    hidden, behind = hidden[:, : tokens.shape[1]], hidden[:, tokens.shape[1] :]
    out = put_choice(no_choices(rows, levels), first, alive, jnp.int32(0))
    used = state.used.at[every, first.token].max(alive)
    rows, out, path = go_along(model.logits(hidden), tokens, parents, there, rows, used, out, on)
    count = jnp.sum(out.token >= 0, axis=1, dtype=jnp.int32)
    read = jnp.take_along_axis(tokens, path, axis=1)
    along = jnp.take_along_axis(hidden, path[:, :, None], axis=1)
    waiting = waiting_along(waiting, path) if trees_too else waiting
    state = take_in_first(model, state, waiting, along, read, count)
    if prompts is not None and ahead is not None:
        last = jnp.take_along_axis(path, jnp.maximum(count - 1, 0)[:, None], axis=1)
        own = len(prompts) * last + jnp.arange(len(prompts), dtype=jnp.int32)
        said = jnp.take_along_axis(behind, own[:, :, None], axis=1)
        ahead = jnp.where((count > 0)[:, None, None], said.astype(ahead.dtype), ahead)
    guessed = jnp.sum(there[:, 1:], axis=1, dtype=jnp.int32)
    return state, rows, Drawn(*out, bad, guessed, jnp.any(alive)), ahead


class GrownGuesses:
    """Who grows trees for the rows of a batch, and what prompt tokens have said behind each row's newest token.

    A row that has entered, or has read a token without prompt tokens, knows of none: its next pass reads them behind
    its token, and guesses nothing yet.

    Args:
      draft: who guesses.
      model, rows, caches: of the batch.

    Attributes:
      trees, prompts: as `decode_grown` takes them. ahead: what was said there.

    Raises:
      ValueError: it guesses for another model, or has prompt tokens that the model, or a cache, cannot read.
    """

    def __init__(self, draft: TreeDrafter, model: Decoder, rows: int, caches: Sequence[Cache]):
        if draft.model.config != model.config:
            raise ValueError("what guesses was trained for another model")
        trees = takes_trees(model, caches)
        if draft.prompts is not None and not trees:
            raise ValueError(NO_TREES)
        self.trees = draft.trees if trees else draft.trees.chains()
        self.prompts, self._rows, self._dtype = draft.prompts, rows, model.dtype
        self.reset()

    def reset(self) -> None:
        """No row knows anything."""
        self._ready = np.full(self._rows, self.prompts is None)
        self.ahead = None
        if self.prompts is not None:
            self.ahead = jnp.zeros((self._rows, *self.prompts.shape), self._dtype)

    def forget(self, row: int | None = None) -> None:
        """Another stream has a row, or all rows have read a token without prompt tokens."""
        if self.prompts is not None:
            self._ready[slice(None) if row is None else row] = False

    def decode(
        self,
        model: Decoder,
        state: StreamState,
        rows: RowSampling,
        active: Bool[np.ndarray, " B"],
        lengths: Int32[np.ndarray, "B 1"],
    ) -> tuple[StreamState, RowSampling, Drawn]:
        """A pass in which each row reads so many tokens at most; state and rows are donated."""
        most = np.where(self._ready, lengths[:, 0], 1).astype(np.int32)
        state, rows, drawn, self.ahead = decode_grown(
            model, state, rows, active, most, self.trees, self.prompts, self.ahead
        )
        if self.prompts is not None:
            self._ready |= active
        return state, rows, drawn
