"""Verification: the model reads guessed tokens in one pass, and keeps those that it would have chosen itself.

The model's own choice behind each place is made as `generate` makes it, with the same random numbers, and a guess
counts if it is that choice. So what comes out is what plain decoding gives, token for token, sampled or greedy,
whoever guesses (a drafter-invariant coupling, 2408.07978); speculative sampling (2211.17192, 2302.01318) keeps the
distribution only. A certain guess is kept as often as by that rule. A drafter that draws its guesses takes the same
random numbers: it then agrees with probability (1 - d) / (1 + d) at least, where that rule has 1 - d, d being the
distance of the two models.

A tree of guesses is read in the same way (`tree_verification.py`).

One thing differs. Logits of a pass over several tokens are rounded in another order than those of single tokens: where
two tokens are equally good to the last bits, the other one may win. Where a cache changes under a chunk each guess sees
what it would see if those before it had been read one by one (`kv.cache.Deferred`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.speculative.choosing import choose, seen_at
from streamjax.streaming.speculative.two_phases import harmless, look_ahead, take_in_first
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance

# From logits, and from which ids were seen (None where the state does not note them), the token behind each place.
Choice = Callable[[Float[Array, "B C V"], Bool[Array, "B C V"] | None], Int32[Array, "B C"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """What a pass has come to.

    state: it has read `count` tokens of each row, the first ones of `tokens`. following: the token that each row reads
    next; it means nothing in rows that read none. failed: rows whose logits were not finite where that token was
    chosen. ahead: hidden states of the prompt tokens behind the last token of each row that was read, where there are
    prompt tokens.
    """

    state: StreamState
    tokens: Int32[Array, "B C"]
    count: Int32[Array, " B"]
    following: Int32[Array, " B"]
    failed: Bool[Array, " B"]
    ahead: Float[Array, "B M E"] | None = None


def verify(
    model: Decoder,
    state: StreamState,
    tokens: Int32[Array, "B C"],
    given: Int32[Array, " B"],
    choice: Choice,
    stop: tuple[int, ...] = (),
    *,
    note_seen: bool = False,
) -> Verified:
    """Read of each row the certain token and the guesses behind it that turn out right. For use under `jax.jit`.

    Args:
      model: the model.
      state: where the streams stand. It comes back as if only the tokens that were right had been read.
      tokens: of each row the token that comes next for certain, and guesses.
      given: how many of each row's tokens are there, the certain one included; a row of 0 stands still.
      choice: how the model chooses, see `choose`.
      stop: ids behind which a row reads nothing more.
      note_seen: tell the choice which ids were seen at each place, which a repetition penalty asks.
    """
    width = tokens.shape[1]
    if width == 1:
        state, hidden = advance(model, state, tokens, given)
    else:
        given = harmless(model, state, given)
        hidden, waiting = look_ahead(model, state, tokens, given)
    logits = model.logits(hidden)
    seen = None
    if note_seen and state.used is not None:
        seen = seen_at(state.used, tokens)
    chosen = choice(logits, seen)
    fine = jnp.isfinite(jnp.max(logits, axis=-1))
    if width == 1:
        return Verified(state, tokens, given, chosen[:, 0], (given > 0) & ~fine[:, 0])
    right = fine[:, :-1] & (chosen[:, :-1] == tokens[:, 1:])
    if stop:
        right &= ~(tokens[:, :-1, None] == jnp.array(stop)).any(axis=-1)
    accepted = 1 + jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
    count = jnp.minimum(accepted, given)
    state = take_in_first(model, state, waiting, hidden, tokens, count)
    last = jnp.maximum(count - 1, 0)[:, None]
    following, finite = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (chosen, fine))
    return Verified(state, tokens, count, following, (count > 0) & ~finite)


@partial(jax.jit, static_argnames=("sampler", "stop"), donate_argnames="state")
def verify_pass(
    model: Decoder,
    state: StreamState,
    tokens: Int32[Array, "B C"],
    given: Int32[Array, " B"],
    key: Array | None,
    index: Int32[Array, " B"],
    sampler: Sampler,
    stop: tuple[int, ...],
) -> Verified:
    """`verify` by a sampler; `index[b]` is the number of the draw behind row b's first token. The state is donated."""

    def choice(logits: Array, seen: Array | None) -> Array:
        return choose(sampler, logits, key, index, seen)

    return verify(model, state, tokens, given, choice, stop, note_seen=sampler.repetition_penalty != 1.0)


@partial(jax.jit, static_argnames="sampler")
def choose_first(
    model: Decoder, state: StreamState, key: Array | None, index: Int32[Array, " B"], sampler: Sampler
) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """The token that each stream reads next, and whether the logits that it was chosen from were not finite."""
    logits = model.logits(state.hidden[:, None])
    seen = state.used[:, None] if sampler.repetition_penalty != 1.0 and state.used is not None else None
    return choose(sampler, logits, key, index, seen)[:, 0], ~jnp.isfinite(jnp.max(logits[:, 0], axis=-1))
