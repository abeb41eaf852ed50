"""Generation: read a prompt in chunks, then sample and read one token at a time, in blocks that run on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from streamjax.models.decoder import Decoder
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.scan import read, row_lengths
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance, require_room

BLOCK = 32  # tokens between two looks at the host


@partial(jax.jit, static_argnames=("sampler", "stop", "block"), donate_argnames=("state", "seen"))
def _decode_block(
    model: Decoder,
    state: StreamState,
    done: Bool[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    key: Array | None,
    index: Int32[Array, ""],
    count: Int32[Array, ""],
    sampler: Sampler,
    stop: tuple[int, ...],
    block: int,
) -> tuple[StreamState, Bool[Array, " B"], Bool[Array, "B V"] | None, Int32[Array, "B N"]]:
    """Sample and read `count` <= `block` tokens of each stream, in a loop on the device.

    Token i of the block is drawn with the key folded with `index + i`. Streams that are done keep their state and yield
    -1; when all are done the loop ends.
    """

    def alive(carry: tuple) -> Array:
        _, done, _, _, i = carry
        return (i < count) & ~jnp.all(done)

    def one(carry: tuple) -> tuple:
        state, done, seen, out, i = carry
        logits = model.logits(state.hidden[:, None])[:, 0]
        token = sampler.sample(logits, None if key is None else jax.random.fold_in(key, index + i), seen)
        state, _ = advance(model, state, token[:, None], jnp.where(done, 0, 1))
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].max(~done)
        out = jax.lax.dynamic_update_slice_in_dim(out, jnp.where(done, -1, token)[:, None], i, axis=1)
        if stop:
            done = done | (token[:, None] == jnp.array(stop)).any(axis=1)
        return state, done, seen, out, i + 1

    out = jnp.full((done.shape[0], block), -1, jnp.int32)
    state, done, seen, out, _ = jax.lax.while_loop(alive, one, (state, done, seen, out, jnp.int32(0)))
    return state, done, seen, out


def generate_blocks(
    model: Decoder,
    state: StreamState,
    prompt: Int[Array, "B T"] | np.ndarray,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Array | None = None,
    prompt_lengths: Int[Array, " B"] | np.ndarray | None = None,
    stop_tokens: Sequence[int] = (),
    chunk_size: int = 512,
    block: int = BLOCK,
    first_index: int = 0,
    penalised: Bool[Array, "B V"] | np.ndarray | None = None,
) -> Iterator[tuple[StreamState, np.ndarray]]:
    """Generate, yielding `(state, tokens [B, n])` every `block` tokens: what a program that shows text consumes.

    Arguments as in `generate`. The state is donated to the next block: keep only the newest, or copy it. To continue an
    earlier call as if it had not ended, pass its key and, as `first_index`, how many tokens it drew; `penalised` marks
    tokens that the repetition penalty meets besides those of the prompt.
    """
    sampler = sampler or Sampler()
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}")
    if not sampler.greedy and key is None:
        raise ValueError("sampling needs a PRNG key: pass key=jax.random.key(seed), or Sampler(temperature=0)")
    prompt = np.asarray(prompt)
    lengths = row_lengths(prompt, prompt_lengths)
    if prompt.shape[0] != state.batch_size:
        raise ValueError(f"{prompt.shape[0]} prompts for {state.batch_size} streams")
    if bool(((lengths == 0) & (np.asarray(state.seen) == 0)).any()):
        raise ValueError("a stream that has seen nothing needs a prompt of at least one token, such as BOS")
    require_room(state, lengths + max_new_tokens)
    state = read(model, state, prompt, chunk_size, lengths=lengths)
    seen = None
    if sampler.repetition_penalty != 1.0:
        mask = np.zeros((prompt.shape[0], model.config.vocab_size), bool)
        if penalised is not None:
            mask |= np.asarray(penalised)
        for row, length in enumerate(lengths):
            mask[row, prompt[row, :length]] = True
        seen = jnp.asarray(mask)
    stop, done = tuple(int(t) for t in stop_tokens), jnp.zeros((prompt.shape[0],), bool)
    if max_new_tokens == 0:
        yield state, np.zeros((prompt.shape[0], 0), np.int32)
    for first in range(0, max_new_tokens, block):
        count = min(block, max_new_tokens - first)
        index = jnp.int32(first_index + first)
        state, done, seen, tokens = _decode_block(
            model, state, done, seen, key, index, jnp.int32(count), sampler, stop, block
        )
        yield state, np.asarray(tokens)[:, :count]
        if stop and bool(jnp.all(done)):
            return


def generate(
    model: Decoder,
    state: StreamState,
    prompt: Int[Array, "B T"] | np.ndarray,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Array | None = None,
    prompt_lengths: Int[Array, " B"] | np.ndarray | None = None,
    stop_tokens: Sequence[int] = (),
    chunk_size: int = 512,
) -> tuple[StreamState, Int32[Array, "B N"]]:
    """Read a prompt and continue it.

    The returned state has read the prompt and every generated token, so another call continues the same streams.

    Args:
      model: the model.
      state: where the streams stand; donated.
      prompt: int32 token ids, each row one stream, right-padded; may be empty for streams that have read something.
      max_new_tokens: tokens to generate for each stream.
      sampler: how to choose; plain sampling at temperature 1 by default.
      key: PRNG key; not needed for greedy.
      prompt_lengths: real tokens in each row; all where None.
      stop_tokens: token ids after which a stream ends; it reads that token and then stands still.
      chunk_size: tokens a prefill step.

    Returns:
      The new state and int32 tokens [B, max_new_tokens]; -1 after a stream has ended.

    Raises:
      ValueError: bad shapes, an id outside the vocabulary, a missing key, or a `dense` cache without room for prompt
        and continuation.
    """
    blocks = list(
        generate_blocks(
            model,
            state,
            prompt,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            key=key,
            prompt_lengths=prompt_lengths,
            stop_tokens=stop_tokens,
            chunk_size=chunk_size,
        )
    )
    out = np.concatenate([tokens for _, tokens in blocks], axis=1)
    missing = max_new_tokens - out.shape[1]
    return blocks[-1][0], jnp.asarray(np.pad(out, ((0, 0), (0, missing)), constant_values=-1))
