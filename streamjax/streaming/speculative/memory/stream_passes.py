"""What a pass with guesses takes where streams are continued by `sj.generate` and `sj.Session`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from streamjax.kv.cache import Cache
from streamjax.models.decoder import Decoder
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.speculative.drafter import Drafter
from streamjax.streaming.speculative.memory.live_bytes import live_bytes
from streamjax.streaming.speculative.memory.plan import DraftMemory, fitted
from streamjax.streaming.speculative.tree_verification import verify_tree_pass
from streamjax.streaming.speculative.two_phases import takes_trees
from streamjax.streaming.speculative.verification import verify_pass
from streamjax.streaming.state import StreamState, init_state


def fit_draft(
    drafter: Drafter,
    model: Decoder,
    cache: Cache | Sequence[Cache],
    memory_bytes: int,
    *,
    rows: int = 1,
    sampler: Sampler | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Drafter, DraftMemory]:
    """A drafter whose guesses fit into so much memory beside a model and its streams: this one, or a smaller one.

    Args:
      drafter: for `draft=` of `sj.generate` or `sj.Session`.
      model, cache, dtype: of the streams, as in `init_state`.
      memory_bytes: what guesses may take: weights of their own, what they keep of streams, and a pass over them.
      rows: streams.
      sampler: how tokens are chosen; plain sampling at temperature 1 by default.

    Raises:
      ValueError: nothing fits; one line that says what the least takes.

    Example:
      >>> draft, memory = fit_draft(sj.NGrams(length=3), model, sj.kv.preset("dense", capacity=64), 100_000)
      >>> print(memory)
      3 guesses for a stream: ... kB, ... kB a pass over 4 tokens
    """
    how = sampler or Sampler()
    state = jax.eval_shape(lambda: init_state(model, cache, rows, dtype=dtype, note_used=True))

    def work(one: Drafter) -> int:
        return pass_bytes(one, model, state, how)

    return fitted(drafter, model, rows, memory_bytes, work)


def pass_bytes(drafter: Drafter, model: Decoder, state: StreamState, sampler: Sampler) -> int:
    """What the program holds that reads a drafter's guesses for streams in such a state."""
    rows, width = state.batch_size, 1 + drafter.nodes

    def whole(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    key = jax.eval_shape(lambda: jax.random.key(0))
    if takes_trees(model, state.caches) and (drafter.prompts is not None or drafter.guesses_trees):

        def read(state, tokens, parents, given, index, key):  # type: ignore[no-untyped-def]  # arrays of shapes above
            return verify_tree_pass(
                model, state, tokens, parents, given, key, index, 1 + drafter.length, sampler, (), drafter.prompts
            )

        given = jax.ShapeDtypeStruct((rows, width), jnp.bool_)
        arguments = (state, whole(rows, width), whole(rows, width), given, whole(rows), key)
        return live_bytes(read, *arguments, donated=(0,))

    def read_one_way(state, tokens, given, index, key):  # type: ignore[no-untyped-def]
        return verify_pass(model, state, tokens, given, key, index, sampler, ())

    width = 1 + drafter.length
    return live_bytes(read_one_way, state, whole(rows, width), whole(rows), whole(rows), key, donated=(0,))
