"""Reading and writing in turns: k tokens are read first, then one is written for every few that are read.

The policy is wait-k (Ma et al., STACL, 1810.08398): output token t, from 0 on, is chosen when `wait + between * t`
source tokens were read, or all that there are. A token that was chosen is read when the next one is due, and so sees
what was read of the source meanwhile (2505.16983).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from streamjax.models.decoder import Decoder
from streamjax.streaming.generate import stop_ids
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.simultaneous.groups import GroupedState, advance_group, read_group
from streamjax.streaming.step import require_room
from streamjax.streaming.token_rows import require_ids


def generate_while_reading(
    model: Decoder,
    groups: GroupedState,
    source: Iterable[Sequence[int]],
    *,
    wait: int,
    between: int = 1,
    begin: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Array | None = None,
    first_index: int = 0,
    stop_tokens: Sequence[int] = (),
    chunk_size: int = 512,
) -> Iterator[tuple[GroupedState, int]]:
    """Answer a source while it comes, yielding `(state, token)` for each output token.

    Args:
      model: the model.
      groups: one stream, from `init_groups`, or where it stands; donated to the next token, so keep only the newest.
      source: pieces of token ids, as they come; the next one is asked for when it is needed.
      wait: source tokens that are read before the first output token; those of this call.
      between: source tokens that are read between two output tokens.
      begin: output tokens that are given: BOS, what a template puts before an answer, or, to go on, the newest token of
        an earlier call, which the state has not read.
      max_new_tokens: at most so many output tokens.
      sampler: how to choose; plain sampling at temperature 1 by default.
      key: PRNG key; not needed for greedy.
      first_index: how many tokens earlier calls drew with this key.
      stop_tokens: ids behind which the answer ends.
      chunk_size: source tokens a step.

    Raises:
      ValueError: several streams, nothing to begin with, numbers out of range, an id that the model lacks, a missing
        key, no room in a `dense` cache, or logits that are not finite.
    """
    sampler = sampler or Sampler()
    for name, value, least in (("wait", wait, 0), ("between", between, 0), ("max_new_tokens", max_new_tokens, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    if groups.output.batch_size != 1:
        raise ValueError(f"a source is read for one stream, and the state has {groups.output.batch_size}")
    if not len(begin):
        raise ValueError("begin is empty: an answer begins behind a token that is given, such as BOS")
    if not sampler.greedy and key is None:
        raise ValueError("sampling needs a PRNG key: pass key=jax.random.key(seed), or Sampler(temperature=0)")
    vocab = model.config.vocab_size
    ends, fed = stop_ids(stop_tokens, vocab), np.asarray([begin])
    require_ids(fed, np.array([fed.shape[1]]), vocab)
    require_room(groups.output, np.array([fed.shape[1] + max(max_new_tokens - 1, 0)]))
    return _generate(
        model, groups, _Waiting(source), wait, between, fed, max_new_tokens, sampler, key, first_index, ends, chunk_size
    )


def _generate(
    model: Decoder,
    groups: GroupedState,
    waiting: _Waiting,
    wait: int,
    between: int,
    fed: np.ndarray,
    most: int,
    sampler: Sampler,
    key: Array | None,
    first_index: int,
    ends: tuple[int, ...],
    chunk_size: int,
) -> Iterator[tuple[GroupedState, int]]:
    if sampler.repetition_penalty != 1.0:
        groups = GroupedState(groups.source, groups.output.noting_used(model.config.vocab_size))
    for i in range(most):
        tokens = waiting.take(wait + i * between)
        if tokens:
            groups = read_group(model, groups, [tokens], "source", chunk_size)
        if fed.shape[1] > 1:  # what is given is read but for its last token, which is a program of its own
            groups = read_group(model, groups, fed[:, :-1], "output", chunk_size)
        groups, token, bad = _write(
            model, groups, jnp.asarray(fed[:, -1:], jnp.int32), key, jnp.int32((first_index + i) % 2**31), sampler
        )
        if bool(bad):
            raise ValueError(f"the model's logits are not finite at output token {i}")
        fed = np.asarray(token)[:, None]
        yield groups, int(fed[0, 0])
        if int(fed[0, 0]) in ends:
            return


@partial(jax.jit, donate_argnames="groups", static_argnames="sampler")
def _write(
    model: Decoder, groups: GroupedState, token: Int32[Array, "B 1"], key: Array | None, index: Array, sampler: Sampler
) -> tuple[GroupedState, Int32[Array, " B"], Bool[Array, ""]]:
    groups, hidden = advance_group(model, groups, token, None, "output")
    logits = model.logits(hidden)[:, 0]
    drawn = None if key is None else jax.random.fold_in(key, index)
    return groups, sampler.sample(logits, drawn, groups.output.used), ~jnp.isfinite(jnp.max(logits))


class _Waiting:
    """What has come of the source and was not read yet."""

    def __init__(self, source: Iterable[Sequence[int]]):
        self._pieces = iter(source)
        self._tokens: list[int] = []
        self._read = 0

    def take(self, until: int) -> list[int]:
        """The next tokens, so that `until` were taken in all, or all that there are."""
        count = max(until - self._read, 0)
        while len(self._tokens) < count:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._tokens += [int(token) for token in piece]
        taken, self._tokens = self._tokens[:count], self._tokens[count:]
        self._read += len(taken)
        return taken
