"""Greedy continuations layer by layer, for short answers under many caches.

`generate` puts all layers and all tokens of a block into one program: the fastest once it is compiled. Its compilation
takes time in proportion to the layers, for each cache anew. Where a few tokens are written under each of many caches,
that is most of the time. Here a token is a chunk that `read_chunk` reads, whose programs equal layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import without_layers
from streamjax.models.nonfinite import not_finite
from streamjax.parallel.multiprocess import on_host
from streamjax.streaming.scan import read, read_chunk
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import require_room
from streamjax.streaming.token_rows import Rows, as_rows

Enough = Callable[[int, list[int]], bool]


@jax.jit
def _best(ends: Decoder, hidden: Float[Array, "B E"]) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """The likeliest next token of each stream, and whether its logits are finite."""
    logits = ends.logits(hidden[:, None])[:, 0]
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.isfinite(jnp.max(logits, axis=-1))


def write_layerwise(
    model: Decoder,
    state: StreamState,
    prompt: Rows,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    chunk_size: int = 512,
    enough: Enough | None = None,
) -> tuple[StreamState, list[list[int]]]:
    """Read a prompt and continue it greedily: what `generate` writes at temperature 0, token by token on the host.

    Args:
      model, state, prompt, max_new_tokens, stop_tokens, chunk_size: as for `generate`; the state is donated. The prompt
        has tokens in every row, or the streams have read something.
      enough: told a row and the tokens that it has so far, says whether it may end there.

    Returns:
      The state, which has read all that was written, and each row's tokens; the last may be a stop token.

    Raises:
      ValueError: what `read` refuses; logits that are not finite (`NotFiniteError`).
    """
    prompt, lengths = as_rows(prompt)
    require_room(state, lengths + max_new_tokens)
    state, ends = read(model, state, prompt, chunk_size, lengths=lengths), without_layers(model)
    written: list[list[int]] = [[] for _ in prompt]
    done = np.zeros(len(prompt), bool)
    for _ in range(max_new_tokens):
        tokens, finite = on_host(_best(ends, state.hidden))
        for row in np.flatnonzero(~done):
            if not finite[row]:
                raise not_finite(model, np.array([*prompt[row, : lengths[row]], *written[row]], np.int32))
            written[row].append(int(tokens[row]))
        state, _ = read_chunk(model, state, jnp.asarray(tokens[:, None]), jnp.asarray(~done, jnp.int32))
        done |= np.isin(tokens, stop_tokens)
        if enough is not None:
            done |= np.array([enough(row, found) for row, found in enumerate(written)], bool)
        if done.all():
            break
    return state, written
