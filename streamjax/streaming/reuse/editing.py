"""`edit`: tokens in the middle of what was read are replaced, and what stands behind them is not read again.

PIE (He et al., 2407.03157): keys behind an edit turn to their new places, and their values stay, so that an edit of a
few tokens in a long text costs those few.
"""

from __future__ import annotations

import numpy as np

from streamjax.models.decoder import Decoder
from streamjax.streaming.reuse.rearranging import Taken, dense_capacity, rearranged
from streamjax.streaming.state import StreamState
from streamjax.streaming.token_rows import Rows, as_rows, require_ids


def edit(
    model: Decoder, state: StreamState, start: int, stop: int, new: Rows, *, capacity: int | None = None
) -> StreamState:
    """The same streams with `new` in the place of their tokens `start` to `stop` - 1.

    New tokens read what stands in front of them, and are computed exactly. What stands behind them keeps its values,
    which saw the old tokens: that is the paper's approximation, and exact in a model of one layer, or where nothing is
    behind. The prediction of the next token is that of before, unless the edit reaches the end. The state is not
    donated.

    Args:
      model: the model that read the streams.
      state: of streams that have read equally many tokens into a `dense` cache.
      start, stop: indices in the stream, from 0; equal to insert tokens.
      new: ids, one row a stream, all of one length; none to delete.
      capacity: of the new state; that of the old one where None.

    Raises:
      ValueError: a cache that does not keep everything, indices that are not in the stream, rows that are not as
        described, or more tokens than there is room for.

    Example:
      >>> state = sj.read(model, state, prompt)
      >>> state = sj.edit(model, state, 5, 9, [tokenizer.encode("at")])  # "upon" becomes "at"
      >>> sj.edit(model, state, 0, 5, [[]]).seen.tolist()  # and "Once " goes
      [9]
    """
    room = dense_capacity(model, state, "an edit")
    total = int(np.asarray(state.seen)[0])
    if not 0 <= start <= stop <= total:
        raise ValueError(f"an edit from {start} to {stop} is not within the {total:,} tokens that were read")
    ids, lengths = as_rows(new)
    if len(ids) != state.batch_size or (lengths != ids.shape[1]).any():
        raise ValueError(f"an edit needs {state.batch_size} rows of one length; they have {lengths.tolist()}")
    require_ids(ids, lengths, model.config.vocab_size)
    place = np.arange(total)
    keep, by = (place < start) | (place >= stop), np.where(place >= stop, ids.shape[1] - (stop - start), 0)
    return rearranged(model, [Taken(state, keep, by)], capacity or room, ids, start + np.arange(ids.shape[1]))
