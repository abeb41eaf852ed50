"""What a pass with guesses takes in an engine's batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.serving.batch import Batch
from streamjax.serving.drafts.decoding import decode_guessed
from streamjax.serving.drafts.grown import GrownGuesses, decode_grown
from streamjax.serving.drafts.guessing import WAYS
from streamjax.streaming.speculative.drafter import Drafter
from streamjax.streaming.speculative.heads.tree_drafter import TreeDrafter
from streamjax.streaming.speculative.memory.live_bytes import live_bytes


def pass_bytes(drafter: Drafter, batch: Batch) -> int:
    """What the program holds that reads a drafter's guesses for all rows, beside the rows themselves."""
    model, rows = batch.decoding.model, batch.rows
    state, sampling = jax.tree.map(_shape, (batch.whole(), batch.sampling))
    active = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    if isinstance(drafter, TreeDrafter):
        grown = GrownGuesses(drafter, batch.model, rows, batch.caches)

        def read_trees(state: Any, sampling: Any, active: Any, most: Any, ahead: Any) -> Any:
            return decode_grown(model, state, sampling, active, most, grown.trees, grown.prompts, ahead)

        most, ahead = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.tree.map(_shape, grown.ahead)
        return live_bytes(read_trees, state, sampling, active, most, ahead, donated=(0, 1, 4))

    def read_ways(state: Any, sampling: Any, active: Any, ways: Any, lengths: Any) -> Any:
        return decode_guessed(model, state, sampling, active, ways, lengths)

    ways = jax.ShapeDtypeStruct((rows, WAYS, 1 + drafter.length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows, WAYS), jnp.int32)
    return live_bytes(read_ways, state, sampling, active, ways, lengths, donated=(0, 1))


def _shape(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
