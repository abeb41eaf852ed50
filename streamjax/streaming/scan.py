"""Long stretches of a stream: cut into chunks of a few static sizes, and read layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from streamjax.kv.cascade import Cascade
from streamjax.kv.tiers.landmark_memory import ChunkMemory
from streamjax.kv.tiers.window import Window
from streamjax.models.decoder import Decoder, FlatModel, require_looking_ahead
from streamjax.models.nonfinite import not_finite
from streamjax.parallel.multiprocess import on_host
from streamjax.streaming.by_layer.grouped_heads import channels_between
from streamjax.streaming.by_layer.in_turn import in_turn
from streamjax.streaming.by_layer.layerwise import read_layerwise
from streamjax.streaming.by_layer.reading_apart import read_chunk_apart
from streamjax.streaming.by_layer.second_mesh import lies_apart
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance, require_room, surprise
from streamjax.streaming.token_rows import Rows, as_rows, require_ids

SCAN_CHUNKS = 16  # full chunks that one call of a compiled program reads,
HIDDEN_BYTES = 2**27  # unless what a layer makes of them takes more than this


def padded_width(length: int, chunk_size: int) -> int:
    """Smallest power of two that holds `length` tokens, at most `chunk_size`: few widths, so few compiled programs."""
    return min(1 << max(length - 1, 0).bit_length(), chunk_size)


def spans(length: int, chunk_size: int, group: int = SCAN_CHUNKS) -> Iterator[tuple[int, int, int]]:
    """Cut `length` tokens into (start, chunks, width): groups of `group` full chunks, single ones, a padded end."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    start = 0
    while length - start >= chunk_size:
        chunks = group if length - start >= group * chunk_size else 1
        yield start, chunks, chunk_size
        start += chunks * chunk_size
    if start < length:
        yield start, 1, padded_width(length - start, chunk_size)


def cut(
    tokens: np.ndarray, lengths: np.ndarray, start: int, chunks: int, width: int
) -> tuple[Int32[Array, "N B C"], Int32[Array, "N B"]]:
    """Tokens [start, start + chunks * width) as chunks, padded with zeros, and the real tokens in each."""
    piece = tokens[:, start : start + chunks * width]
    piece = np.pad(piece, ((0, 0), (0, chunks * width - piece.shape[1])))
    offsets = start + np.arange(chunks)[:, None] * width
    count = np.clip(lengths[None] - offsets, 0, width).astype(np.int32)
    shaped = piece.reshape(piece.shape[0], chunks, width).swapaxes(0, 1).astype(np.int32)
    return jnp.asarray(shaped), jnp.asarray(count)


@partial(jax.jit, donate_argnames="state", static_argnames="memorise")
def _read_chunks(
    flat: FlatModel,
    state: StreamState,
    tokens: Int32[Array, "N B C"],
    count: Int32[Array, "N B"],
    memorise: int | None = None,
) -> StreamState:
    model = flat.model
    return in_turn(lambda s, x: (advance(model, s, *x, memorise=memorise)[0], None), state, (tokens, count))[0]


def passed_over(model: Decoder, state: StreamState) -> tuple[int, int] | None:
    """What a long stretch needs of a model whose upper layers see a chunk memory and windows alone.

    The memory is made below them, and what they compute of a token is forgotten when it leaves their windows. So the
    layers from the topmost memory layer on have to run for the last tokens of a stretch only; for all before these the
    memory layer has to encode its input. Exact: those tokens' keys would all be gone.

    Returns:
      That layer, and for how many of the last tokens it and the layers above it have to run; None where a layer there
      keeps anything else.
    """
    config, reach = model.config, 0
    if config.hsa is None:
        return None
    top = config.hsa.memory_layers[-1]
    for cache in state.caches[top:]:
        own = cache.own if isinstance(cache, ChunkMemory) else cache
        if not isinstance(own, Cascade) or not all(isinstance(tier, Window) for tier in own.tiers):
            return None
        reach += own.slots
    return top, reach + 1


@partial(jax.jit, donate_argnames="state")
def _score_chunks(
    model: Decoder, state: StreamState, tokens: Int32[Array, "N B C"], count: Int32[Array, "N B"]
) -> tuple[StreamState, Float[Array, "N B C"]]:
    def body(state: StreamState, x: tuple[Array, Array]) -> tuple[StreamState, Array]:
        new, hidden = advance(model, state, *x)
        return new, surprise(model, state, hidden, *x)

    return in_turn(body, state, (tokens, count))


def read_chunk(
    model: Decoder,
    state: StreamState,
    tokens: Int32[Array, "B C"],
    count: Int32[Array, " B"],
    *,
    scored: bool = False,
    flat: FlatModel | None = None,
) -> tuple[StreamState, Float[Array, "B C"] | None]:
    """Read one chunk of tokens that were checked before; the state is donated. Nats a token if `scored`.

    `read` in chunks of this width does the same, to the bit: by the same programs. `flat` is the model once more, for
    who reads chunk after chunk.
    """
    piece = tokens[None], count[None]
    if model.by_layers:
        state, nats = read_layerwise(model, state, *piece, scored=scored)
        return state, None if nats is None else nats[0]
    if scored:
        state, nats = _score_chunks(model, state, *piece)
        return state, nats[0]
    return _read_chunks(FlatModel(model) if flat is None else flat, state, *piece), None


def _group(model: Decoder, state: StreamState, chunk_size: int) -> int:
    """How many full chunks are read by one call of each program."""
    if lies_apart(state):
        return 1
    channels = model.config.stream_width + channels_between(model, state)
    a_chunk = state.batch_size * chunk_size * channels * model.dtype.itemsize
    return SCAN_CHUNKS if SCAN_CHUNKS * a_chunk <= HIDDEN_BYTES else 1


def read(
    model: Decoder,
    state: StreamState,
    tokens: Rows,
    chunk_size: int = 512,
    *,
    lengths: Int[Array, " B"] | np.ndarray | Sequence[int] | None = None,
) -> StreamState:
    """Read a stretch of each stream and return the state behind it: prefill. Arguments as in `score`.

    Of a model with a chunk memory the upper layers run for the last tokens alone, where that is exact (`passed_over`).

    Example:
      >>> state = sj.read(model, state, prompt)
      >>> state.seen.tolist()
      [16]
    """
    tokens, lengths = as_rows(tokens, lengths)
    require_room(state, lengths)
    require_ids(tokens, lengths, model.config.vocab_size)
    layer, last = passed_over(model, state) or (None, 0)
    early = 0 if layer is None else max(int(lengths.min()) - last, 0) // chunk_size * chunk_size
    flat = FlatModel(model)
    for start, chunks, width in spans(early, chunk_size):
        state = _read_chunks(flat, state, *cut(tokens, lengths, start, chunks, width), memorise=layer)
    tokens, lengths, apart = tokens[:, early:], lengths - early, lies_apart(state)
    for start, chunks, width in spans(int(lengths.max(initial=0)), chunk_size, _group(model, state, chunk_size)):
        piece = cut(tokens, lengths, start, chunks, width)
        if apart:
            state, _ = read_chunk_apart(model, state, *(one[0] for one in piece))
        elif model.by_layers:
            state, _ = read_layerwise(model, state, *piece)
        else:
            state = _read_chunks(flat, state, *piece)
    return state


def read_prefix(
    model: Decoder,
    state: StreamState,
    tokens: Rows,
    chunk_size: int = 512,
    *,
    lengths: Int[Array, " B"] | np.ndarray | Sequence[int] | None = None,
) -> StreamState:
    """Read a stretch of each stream as a prefix: layers of prefix linear attention look at all of it first.

    Each of its tokens then sees the whole stretch (JRT-RNN, 2407.05483), and what is read behind it, by any function,
    is read one token after the other. The call says where a prompt ends, and nothing else does: what has to be seen
    whole goes into one call. A stream may have several prefixes, one behind the other, and a row of no tokens none.

    The result does not depend on `chunk_size`. Inputs of a layer are held for the whole stretch, E channels a token:
    its length is bounded by memory, what comes behind it is not. Arguments and the state are those of `score`.

    Raises:
      ValueError: as in `score`; a model without such layers, or with layers that read what another one stores.

    Example:
      >>> from streamjax.models.config import PrefixLinearConfig
      >>> mixer = PrefixLinearConfig(num_heads=2, num_groups=2, key_dim=4, value_dim=8)
      >>> block = sj.BlockConfig(mixer=mixer, mlp=None)
      >>> model = sj.Decoder(sj.ModelConfig(vocab_size=259, d_model=16, blocks=(block,) * 2), jax.random.key(0))
      >>> state = sj.init_state(model, sj.kv.preset("window", window=64))
      >>> state = sj.read_prefix(model, state, [[5, 6, 7]])
      >>> state.seen.tolist()
      [3]
    """
    require_looking_ahead(model.config)
    tokens, lengths = as_rows(tokens, lengths)
    require_room(state, lengths)
    require_ids(tokens, lengths, model.config.vocab_size)
    if not model.by_layers or lies_apart(state):
        raise ValueError("a prefix is read layer by layer, which models whose layers read what another stores are not")
    length = int(lengths.max(initial=0))
    if length == 0:
        return state
    width = padded_width(length, chunk_size)
    chunks = 1 << (-(-length // width) - 1).bit_length()  # a power of two, so that there are few programs
    return read_layerwise(model, state, *cut(tokens, lengths, 0, chunks, width), ahead=True)[0]


def score(
    model: Decoder,
    state: StreamState,
    tokens: Rows,
    chunk_size: int = 512,
    *,
    lengths: Int[Array, " B"] | np.ndarray | Sequence[int] | None = None,
) -> tuple[StreamState, Float[Array, "B T"]]:
    """Per-token negative log-likelihood of a stretch of each stream.

    Scoring a stream in pieces gives what scoring it at once gives: the state carries the prediction of the next token.
    The very first token of a stream, which nothing predicts, costs log(vocabulary). The state is donated.

    Args:
      model: the model.
      state: where the streams stand.
      tokens: token ids, one row a stream: an array [B, T], or a sequence of rows that may differ in length.
      chunk_size: tokens a step.
      lengths: real tokens in each row, where rows are right-padded; all where None.

    Returns:
      The new state, and nats a token, float32 [B, T], T being the longest row's length; 0 at padding.

    Raises:
      ValueError: more tokens than a `dense` cache has room for, lengths that do not fit the rows, or an id outside the
        vocabulary; nothing has been read then. A result that is not finite (`NotFiniteError`, which says where the
        model first went wrong).

    Example:
      >>> state, nats = sj.score(model, state, prompt)
      >>> nats.shape, round(float(nats[0, 0]), 3)  # the first token costs log(259)
      ((1, 16), 5.557)
    """
    tokens, lengths = as_rows(tokens, lengths)
    state, nll = score_unwaited(model, state, tokens, chunk_size, lengths=lengths)
    require_finite(model, nll, tokens)
    return state, nll


def require_finite(model: Decoder, nll: Float[Array, "B T"] | np.ndarray, tokens: Int[np.ndarray, "B T"]) -> None:
    """Raise a `NotFiniteError` unless what the tokens cost is finite; it waits for the result."""
    finite = np.isfinite(nll) if isinstance(nll, np.ndarray) else jnp.isfinite(nll)
    if not bool(finite.all()):
        found = on_host(finite)
        row = int(np.argmin(found.all(axis=1)))
        first = int(np.argmin(found[row]))
        raise not_finite(model, tokens[row, : first + 1])


def score_unwaited(
    model: Decoder,
    state: StreamState,
    tokens: Int[np.ndarray, "B T"],
    chunk_size: int,
    *,
    lengths: Int[np.ndarray, " B"],
) -> tuple[StreamState, Float[Array, "B T"]]:
    """`score`, whose result is neither waited for nor looked at: it may not be finite."""
    require_room(state, lengths)
    require_ids(tokens, lengths, model.config.vocab_size)
    pieces, apart = [jnp.zeros((tokens.shape[0], 0), jnp.float32)], lies_apart(state)
    for start, chunks, width in spans(int(lengths.max(initial=0)), chunk_size, _group(model, state, chunk_size)):
        piece = cut(tokens, lengths, start, chunks, width)
        if apart:
            state, nll = read_chunk_apart(model, state, *(one[0] for one in piece), scored=True)
            assert nll is not None
            nll = nll[None]
        elif model.by_layers:
            state, nll = read_layerwise(model, state, *piece, scored=True)
            assert nll is not None
        else:
            state, nll = _score_chunks(model, state, *piece)
        pieces.append(jnp.swapaxes(nll, 0, 1).reshape(tokens.shape[0], -1))
    nll = jnp.concatenate(pieces, axis=1)[:, : tokens.shape[1]]
    return state, jnp.pad(nll, ((0, 0), (0, tokens.shape[1] - nll.shape[1])))
