"""Generation: read a prompt in chunks, then sample and read one token at a time, in blocks that run on the device."""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from streamjax.models.decoder import Decoder
from streamjax.models.nonfinite import not_finite
from streamjax.parallel.multiprocess import on_host
from streamjax.parallel.rules import constrain
from streamjax.streaming.by_layer.reading_apart import decode_apart, refuse_apart
from streamjax.streaming.by_layer.second_mesh import lies_apart
from streamjax.streaming.decode_block import decode_block
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.scan import read
from streamjax.streaming.speculative.decoding import Limit, Rounds, speculate
from streamjax.streaming.speculative.drafter import Drafter
from streamjax.streaming.speculative.history import History
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import require_room
from streamjax.streaming.token_rows import Rows, as_rows

BLOCK = 32  # tokens between two looks at the host


def stop_ids(tokens: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Ids that end a stream, each once.

    Raises:
      ValueError: one that the vocabulary does not have.
    """
    ids = []
    for token in dict.fromkeys(tokens):
        try:
            ids.append(operator.index(token))
        except TypeError:
            raise ValueError(f"stop token {token!r} is no token id") from None
        if not 0 <= ids[-1] < vocab_size:
            raise ValueError(f"stop token id {token} is outside the model's vocabulary of {vocab_size}")
    return tuple(ids)


def generate_blocks(
    model: Decoder,
    state: StreamState,
    prompt: Rows,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Array | None = None,
    prompt_lengths: Int[Array, " B"] | np.ndarray | Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    chunk_size: int = 512,
    block: int = BLOCK,
    first_index: int = 0,
    penalised: Bool[Array, "B V"] | np.ndarray | None = None,
    draft: Drafter | None = None,
    histories: Sequence[History] | None = None,
    limit: Limit | None = None,
) -> Iterator[tuple[StreamState, np.ndarray]]:
    """Generate, yielding `(state, tokens [B, n])` every `block` tokens: what a program that shows text consumes.

    Arguments as in `generate`. With a `draft` a yield has `block` tokens or more of the fastest stream, and -1 behind
    those of the others; `histories` are what the drafter knows of each stream, the prompt alone where None, and `limit`
    says where a single stream's text ends (`speculative.decoding.Limit`). The state is donated to the next block: keep
    only the newest, or copy it. To continue an earlier call as if it had not ended, pass its key and, as `first_index`,
    how many tokens it drew. `penalised` marks ids that the repetition penalty meets besides those that the state has
    noted (`StreamState.used`); it notes them.

    Example:
      >>> for state, tokens in sj.generate_blocks(model, state, prompt, max_new_tokens=8, block=4, sampler=greedy):
      ...     print(tokens.shape)
      (1, 4)
      (1, 4)
    """
    sampler = sampler or Sampler()
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}")
    if not sampler.greedy and key is None:
        raise ValueError("sampling needs a PRNG key: pass key=jax.random.key(seed), or Sampler(temperature=0)")
    vocab = model.config.vocab_size
    stop = stop_ids(stop_tokens, vocab)
    prompt, lengths = as_rows(prompt, prompt_lengths)
    if prompt.shape[0] != state.batch_size:
        raise ValueError(f"{prompt.shape[0]} prompts for {state.batch_size} streams")
    if bool(((lengths == 0) & (on_host(state.seen) == 0)).any()):
        raise ValueError("a stream that has seen nothing needs a prompt of at least one token, such as BOS")
    require_room(state, lengths + max_new_tokens)
    if draft is not None:
        refuse_apart(state, "a draft")
    decode = decode_apart if lies_apart(state) else decode_block
    if sampler.repetition_penalty != 1.0:
        state = state.noting_used(vocab)
        if penalised is not None and state.used is not None:
            used = constrain(state.used | jnp.asarray(penalised), "batch", "vocab")
            state = dataclasses.replace(state, used=used)
    state = read(model, state, prompt, chunk_size, lengths=lengths)
    if draft is not None and max_new_tokens:
        streams = [History() for _ in prompt] if histories is None else histories
        for stream, row, length in zip(streams, prompt, lengths, strict=True):
            stream.extend(row[:length])
        index = np.full(len(prompt), first_index)
        rounds = Rounds(
            model, state, draft, streams, sampler=sampler, key=key, index=index, stop=stop, limit=limit, block=block,
        )  # fmt: skip
        yield from speculate(rounds, max_new_tokens, stop, block)
        return
    done = jnp.zeros((prompt.shape[0],), bool)
    newest: collections.deque[np.ndarray] = collections.deque(maxlen=BLOCK)  # tokens of all streams, one after another
    if max_new_tokens == 0:
        yield state, np.zeros((prompt.shape[0], 0), np.int32)
    for first in range(0, max_new_tokens, block):
        count = min(block, max_new_tokens - first)
        index = jnp.int32(first_index + first)
        state, done, out, bad = decode(model, state, done, key, index, jnp.int32(count), sampler, stop, block)
        tokens, failed = on_host((out, bad))
        tokens = tokens[:, :count]
        if failed.any():
            tokens = tokens[:, : int((tokens >= 0).any(axis=0).sum())]
        newest.extend(tokens.T)
        yield state, tokens
        if failed.any():
            row = int(np.argmax(failed))
            drawn = [column[row] for column in newest if column[row] >= 0]
            raise not_finite(model, np.array([*prompt[row, : lengths[row]], *drawn], np.int32))
        if stop and bool(jnp.all(done)):
            return


def generate(
    model: Decoder,
    state: StreamState,
    prompt: Rows,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Array | None = None,
    prompt_lengths: Int[Array, " B"] | np.ndarray | Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    chunk_size: int = 512,
    draft: Drafter | None = None,
) -> tuple[StreamState, Int32[Array, "B N"]]:
    """Read a prompt and continue it.

    The returned state has read the prompt and every generated token, so another call continues the same streams.

    Args:
      model: the model.
      state: where the streams stand; donated.
      prompt: token ids, one row a stream: an array [B, T], or a sequence of rows that may differ in length. Rows may be
        empty for streams that have read something.
      max_new_tokens: tokens to generate for each stream.
      sampler: how to choose; plain sampling at temperature 1 by default. A repetition penalty meets the ids that the
        state has noted: all since `init_state(..., note_used=True)`, or since the first call with a penalty.
      key: PRNG key; not needed for greedy.
      prompt_lengths: real tokens in each row, where rows are right-padded; all where None.
      stop_tokens: token ids after which a stream ends; it reads that token and then stands still. The model's own are
        `model.config.eos_token_ids`, the tokenizer's `eos_ids`.
      chunk_size: tokens a prefill step.
      draft: who guesses tokens that the model then reads several at a time, such as `sj.NGrams()`. What is generated is
        the same, up to the rounding of logits; only the speed depends on it.

    Returns:
      The new state and int32 tokens [B, max_new_tokens]; -1 after a stream has ended.

    Raises:
      ValueError: bad shapes, an id outside the vocabulary, a missing key, a `dense` cache without room for prompt and
        continuation, or logits that are not finite (`NotFiniteError`, which says where they first were).

    Example:
      >>> state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=4, window=60), batch_size=2)
      >>> state, tokens = sj.generate(model, state, [[1, 5, 9], [1]], max_new_tokens=8, sampler=greedy)
      >>> tokens.shape, state.seen.tolist()
      ((2, 8), [11, 9])
    """
    blocks = generate_blocks(
        model,
        state,
        prompt,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        key=key,
        prompt_lengths=prompt_lengths,
        stop_tokens=stop_tokens,
        chunk_size=chunk_size,
        draft=draft,
    )
    pieces = []
    for new_state, new_tokens in blocks:
        state = new_state
        pieces.append(new_tokens)
    tokens = np.concatenate(pieces, axis=1)
    out = np.full((len(tokens), max_new_tokens), -1, np.int32)
    for row, drawn in zip(out, tokens, strict=True):
        drawn = drawn[drawn >= 0]
        row[: len(drawn)] = drawn
        if draft is not None:
            draft.learn(drawn)
    return state, jnp.asarray(out)
