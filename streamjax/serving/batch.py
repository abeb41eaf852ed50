"""What the engine has on the device: a batch of rows, each a stream, and programs of fixed shapes over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.tier import Implementation
from streamjax.models.decoder import Decoder
from streamjax.serving.decoding import Drawn, decode_rows, enter_row, set_bias
from streamjax.serving.row_sampling import RowSampling, no_rows
from streamjax.serving.row_states import Parking, put_row, take_row
from streamjax.streaming.scan import padded_width, read_chunk
from streamjax.streaming.state import StreamState, init_state

_LEAST_WIDTH = 16  # tokens; narrower chunks take as long, and would be programs of their own


class Batch:
    """B rows that decode together, and the reading of one stream beside them.

    A stream is read outside of the batch, as a state of one row, and enters a row when its prompt is over: so a row is
    copied once a request and not once a chunk, and every program has one shape.

    Args:
      model, cache, dtype, implementation: as in `init_state`.
      rows: B.
      chunk_size: tokens that are read at a time.
      block: tokens a row that one call may decode at most.
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
    ):
        self.model, self.rows, self.chunk_size, self.block = model, rows, chunk_size, block

        def start(batch: int) -> StreamState:
            options: dict[str, Any] = {"dtype": dtype, "implementation": implementation, "note_used": True}
            return init_state(model, cache, batch, **options)

        self._start = start
        empty = start(1)
        self.parking = Parking(empty)
        self.caches, self.capacity, self.row_bytes = empty.caches, empty.capacity, empty.cache_bytes
        self.cache_bytes = rows * self.row_bytes
        self.reset()

    def reset(self) -> None:
        """Empty rows."""
        self.state = self._start(self.rows)
        self.sampling = no_rows(self.rows, self.model.config.vocab_size)

    def width(self, tokens: int) -> int:
        """Of the chunk in which so many tokens are read, at most `chunk_size`."""
        return padded_width(max(tokens, min(_LEAST_WIDTH, self.chunk_size)), self.chunk_size)

    def read(
        self, state: StreamState, tokens: Int32[np.ndarray, " T"], scored: bool = False
    ) -> tuple[StreamState, Float[Array, "1 W"] | None]:
        """Read at most `chunk_size` tokens of one stream; the state is donated. With `scored`, nats a token."""
        chunk = np.zeros((1, self.width(len(tokens))), np.int32)
        chunk[0, : len(tokens)] = tokens
        return read_chunk(self.model, state, jnp.asarray(chunk), jnp.asarray([len(tokens)], jnp.int32), scored=scored)

    def enter(self, row: int, state: StreamState, sampling: RowSampling) -> None:
        """A stream and its request take a row."""
        self.state = put_row(self.state, np.int32(row), state)
        self.sampling = enter_row(self.sampling, np.int32(row), sampling)

    def leave(self, row: int) -> StreamState:
        """A copy of a row's stream."""
        return take_row(self.state, np.int32(row))

    def set_bias(self, row: int, bias: Float[np.ndarray, " V"]) -> None:
        """What is added to a row's logits from now on."""
        self.sampling = set_bias(self.sampling, np.int32(row), bias)

    def decode(self, active: Bool[np.ndarray, " B"], count: int) -> Drawn:
        """Draw and read at most `count` tokens of each active row; nothing is waited for."""
        self.state, self.sampling, drawn = decode_rows(
            self.model, self.state, self.sampling, active, np.int32(count), self.block
        )
        return drawn

    def warm_up(self, scored: bool = False) -> None:
        """Compile and run every program once; rows are empty then."""
        width = min(_LEAST_WIDTH, self.chunk_size)
        one = self.parking.empty
        while True:
            one, _ = self.read(one, np.zeros(min(width, self.chunk_size), np.int32), scored)
            if width >= self.chunk_size:
                break
            width *= 2
        one = self.parking.resume(self.parking.park(one))
        bias = np.zeros(self.model.config.vocab_size, np.float32)
        self.enter(0, one, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[0]), no_rows(1, len(bias))))
        self.set_bias(0, bias)
        self.decode(np.zeros(self.rows, bool), 1)
        jax.block_until_ready(self.leave(0))
        self.reset()
