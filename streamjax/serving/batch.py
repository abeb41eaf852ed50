"""What the engine has on the device: a batch of rows, each a stream, and programs of fixed shapes over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.query import Implementation
from streamjax.models.decoder import Decoder
from streamjax.models.lora.row_adapters import Factors, RowAdapters
from streamjax.serving.decoding import Drawn, decode_rows, enter_row, set_bias
from streamjax.serving.drafts.decoding import decode_guessed
from streamjax.serving.drafts.grown import GrownGuesses
from streamjax.serving.drafts.guessing import Guesses
from streamjax.serving.fused import can_be_fused, decode_and_read
from streamjax.serving.row_sampling import RowSampling, no_rows
from streamjax.serving.row_states import ParkedState, Parking, put_row, take_row
from streamjax.streaming.scan import read_chunk
from streamjax.streaming.state import StreamState, init_state

Stream = Any  # a stream of one row: a `StreamState`, or what another batch has in its place
Beginning = Any  # what streams go on from: a `ParkedState`, or what another batch has in its place
_WIDTHS = (1, 4, 16, 64)  # rows of a pass; each is a program
LEAST_WIDTH = 16  # tokens; narrower chunks take as long, and would be programs of their own


class Batch:
    """B rows that decode together, and the reading of one stream beside them.

    A stream is read outside of the batch, as a state of one row, and enters a row when its prompt is over: so a row is
    copied once a request and not once a chunk, and every program has one shape.

    Args:
      model, cache, dtype, implementation: as in `init_state`.
      rows: B.
      chunk_size: tokens that are read at a time.
      block: tokens a row that one call may decode at most.
      adapters: that requests may name.
      held_in: the caches of the rows, where those are others than `cache`, which streams have by themselves.

    Attributes:
      grown: who guesses on the device; None: nobody.
      cut: of what streams go on from, tokens come in multiples of so many.
      narrow: whether a pass computes no more rows than have to be; see `widths`.
      fused: whether rows decode and a chunk is read in the same programs (`decode_and_read`).
      decoding, reading: the model with the adapters of the rows, and with that of the stream that is read.
    """

    def __init__(
        self,
        model: Decoder,
        cache: Cache | Sequence[Cache],
        rows: int,
        chunk_size: int,
        block: int,
        dtype: DTypeLike | None = None,
        implementation: Implementation | None = None,
        adapters: Mapping[str, Factors] = MappingProxyType({}),
        *,
        held_in: Sequence[Cache] | None = None,
    ):
        self.model, self.rows, self.chunk_size, self.block = model, rows, chunk_size, block
        self.grown: GrownGuesses | None = None
        self.narrow = self.fused = False
        self.cut = 1
        self.decoding, self.reading = RowAdapters(model, adapters, rows), RowAdapters(model, adapters, 1)
        self._cache = cache if held_in is None else held_in
        self._options: dict[str, Any] = {"dtype": dtype, "implementation": implementation, "note_used": True}
        empty = init_state(model, cache, 1, **self._options)
        self.parking = Parking(empty)
        self.caches, self.capacity = empty.caches, empty.capacity
        self.cache_bytes = rows * empty.cache_bytes
        self.reset()

    def reset(self) -> None:
        """Empty rows."""
        self.state = init_state(self.model, self._cache, self.rows, **self._options)
        self.sampling = no_rows(self.rows, self.model.config.vocab_size)
        if self.grown is not None:
            self.grown.reset()

    def whole(self) -> StreamState:
        """The rows' streams, as programs have them."""
        return self.state

    # -- streams that are in no row

    def fresh(self) -> Stream:
        """A stream that has read nothing."""
        return self.parking.empty

    def park(self, stream: Stream) -> ParkedState:
        """A copy in the host's memory; the stream itself is of no use after it. Waits for it."""
        return self.parking.park(stream)

    def resume(self, parked: ParkedState) -> Stream | None:
        """The stream that was parked; None where there is no room for it now."""
        return self.parking.resume(parked)

    def keep(self, stream: Stream) -> Beginning:
        """What other streams can go on from, when this one stands between two chunks."""
        return self.parking.park(stream)

    def fork(self, beginning: Beginning) -> Stream:
        """A stream that goes on from what was kept."""
        return self.parking.resume(beginning)

    def drop(self, stream: Stream | Beginning) -> None:
        """Nobody needs it any more."""

    def gives_room(self, beginning: Beginning) -> bool:
        """Whether there may be more room when it is dropped."""
        return False

    def reserve(self, stream: Stream | int, tokens: int) -> bool:
        """Make sure that a stream, or that in a row, can take so many tokens more; False where there is no room now."""
        return True

    @property
    def chunk_widths(self) -> tuple[int, ...]:
        """Of the chunks in which prompts are read. Each is a program; at most a third of a chunk is padding."""
        least = min(LEAST_WIDTH, self.chunk_size)
        doubled = [least << i for i in range((self.chunk_size // least).bit_length())]
        between = [width + width // 2 for width in doubled]
        return (*sorted(width for width in (*doubled, *between) if width < self.chunk_size), self.chunk_size)

    def width(self, tokens: int) -> int:
        """Of the chunk in which so many tokens are read, at most `chunk_size`."""
        return next(width for width in self.chunk_widths if width >= tokens)

    def read(
        self, stream: Stream, tokens: Int32[np.ndarray, " T"], scored: bool = False
    ) -> tuple[Stream, Float[Array, "1 W"] | None]:
        """Read at most `chunk_size` tokens of one stream; its state is donated. With `scored`, nats a token."""
        return self._read(stream, tokens, scored)

    def _read(
        self, state: StreamState, tokens: Int32[np.ndarray, " T"], scored: bool
    ) -> tuple[StreamState, Float[Array, "1 W"] | None]:
        return read_chunk(self.reading.model, state, *self._chunk(tokens), scored=scored, flat=self.reading.flat)

    def _chunk(self, tokens: Int32[np.ndarray, " T"]) -> tuple[Int32[Array, "1 W"], Int32[Array, " 1"]]:
        """Tokens in a chunk of one of few widths, and how many they are."""
        chunk = np.zeros((1, self.width(len(tokens))), np.int32)
        chunk[0, : len(tokens)] = tokens
        return jnp.asarray(chunk), jnp.asarray([len(tokens)], jnp.int32)

    def enter(self, row: int, stream: Stream, sampling: RowSampling) -> None:
        """A stream and its request take a row."""
        self.state = put_row(self.state, np.int32(row), stream)
        self.sampling = enter_row(self.sampling, np.int32(row), sampling)
        if self.grown is not None:
            self.grown.forget(row)

    def leave(self, row: int) -> Stream:
        """A row's stream, which leaves it."""
        return take_row(self.state, np.int32(row))

    def clear(self, row: int) -> None:
        """Nobody needs a row's stream any more."""

    def grew(self, row: int, tokens: int) -> None:
        """A row has read so many tokens, it turned out."""

    def set_bias(self, row: int, bias: Float[np.ndarray, " V"]) -> None:
        """What is added to a row's logits from now on."""
        self.sampling = set_bias(self.sampling, np.int32(row), bias)

    def decode(self, active: Bool[np.ndarray, " B"], count: int, guesses: Guesses | None = None) -> Drawn:
        """Draw and read at most `count` tokens of each active row, or one and what is right of the guesses behind it.

        Nothing is waited for.
        """
        self.state, drawn = self._decode(self.state, active, count, guesses)
        return drawn

    def _decode(
        self, state: StreamState, active: Bool[np.ndarray, " B"], count: int, guesses: Guesses | None
    ) -> tuple[StreamState, Drawn]:
        model, rows = self.decoding.model, self.sampling
        if guesses is None:
            flat = self.decoding.flat
            width = self._rows_of_a_pass(active)
            state, self.sampling, drawn = decode_rows(flat, state, rows, active, np.int32(count), self.block, width)
            if self.grown is not None:
                self.grown.forget()
        elif guesses.tokens is not None:
            state, self.sampling, drawn = decode_guessed(model, state, rows, active, *guesses)
        else:
            assert self.grown is not None
            state, self.sampling, drawn = self.grown.decode(model, state, rows, active, guesses.lengths)
        return state, drawn

    @property
    def can_be_fused(self) -> bool:
        """Whether there is `decode_and_read`: not where adapters lie in the model by row."""
        return not self.decoding.known and can_be_fused(self.model, self.state, self.parking.empty)

    def decode_and_read(
        self, active: Bool[np.ndarray, " B"], stream: Stream, tokens: Int32[np.ndarray, " T"]
    ) -> tuple[Drawn, Stream]:
        """`decode` of one token a row, and `read` of a stream beside it, in the same programs; its state is donated."""
        width, chunk = self._rows_of_a_pass(active), self._chunk(tokens)
        self.state, self.sampling, drawn, stream = decode_and_read(
            self.model, self.state, self.sampling, active, width, stream, *chunk
        )
        if self.grown is not None:
            self.grown.forget()
        return drawn, stream

    @property
    def widths(self) -> tuple[int, ...]:
        """How many rows, the first ones, a pass may compute.

        All, or, if the batch is `narrow`, fewer where few decode. Adapters lie in the model by row, so with them it is
        all rows.
        """
        if self.decoding.known or not self.narrow:
            return (self.rows,)
        return (*(width for width in _WIDTHS if width < self.rows), self.rows)

    def _rows_of_a_pass(self, active: Bool[np.ndarray, " B"]) -> int:
        last = int(np.flatnonzero(active)[-1]) if active.any() else 0
        return next(width for width in self.widths if width > last)

    def warm_up(self, scored: bool = False, guesses: Guesses | None = None) -> None:
        """Compile and run every program once; rows are empty then. guesses: in the shape of those that will come."""
        most = min(self.chunk_size, self.capacity or self.chunk_size)  # no stream reads more at a time
        for width in self.chunk_widths:
            one, tokens = self.fresh(), np.zeros(min(width, most), np.int32)
            self.reserve(one, len(tokens))
            for rows in self.widths if self.fused else ():
                self.decode_and_read(np.arange(self.rows) == rows - 1, self.fresh(), tokens)
            one, _ = self.read(one, tokens, scored)
            if width >= most:
                break
            self.drop(one)
        one = self.resume(self.park(one))
        assert one is not None
        bias = np.zeros(self.model.config.vocab_size, np.float32)
        self.enter(0, one, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[0]), no_rows(1, len(bias))))
        self.set_bias(0, bias)
        for name in self.decoding.known:
            self.decoding.set(0, name)
            self.reading.set(0, name)
        for width in self.widths:
            self.decode(np.arange(self.rows) == width - 1, 1)  # nobody draws: no row has tokens remaining
        if guesses is not None:
            self.decode(np.zeros(self.rows, bool), 1, guesses)
        self.drop(self.fork(self.keep(self.leave(0))))
        self.reset()
