"""What a budget measures of a model: of what its streams hold, or of a text, as a calibration that can be saved."""

from __future__ import annotations

import numpy as np

from streamjax.kv.budgets.budget import Budget
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.budgets.measuring import Measuring
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.compaction import Compaction
from streamjax.kv.layer_caches.recurrence import Recurrence
from streamjax.kv.tiers.full import Full
from streamjax.models.decoder import Decoder
from streamjax.models.nonfinite import not_finite
from streamjax.streaming.compacting.reading_layers import through_layers
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.scan import read
from streamjax.streaming.state import StreamState, budgeted_layers, init_state
from streamjax.streaming.token_rows import Rows, as_rows, require_one_length


def measure_budget(model: Decoder, text: Rows, budget: Budget, *, queries: int | None = 32) -> Calibration:
    """What `budget` wants to know of a model, from the attention within a text.

    Args:
      model: the model.
      text: token ids, one row a text, all of one length.
      budget: `sj.kv.Preferences()` (CAKE), `sj.kv.Prefixes()` (PrefixKV), `sj.kv.Density()` (D2O), or one of your own.
      queries: how many of the last tokens are asked whom they attend to; all where None. Their attention to the whole
        text is in memory at once, for each layer.

    Returns:
      What `Budgeted(calibration=)` takes; `save` writes it, and presets take the file (`calibration=FILE`).

    Raises:
      ValueError: rows of different lengths, or shorter than two tokens; a budget that measures nothing.
      NotFiniteError: what the model makes of the text is not finite.

    Example:
      >>> sj.measure_budget(model, prompt, sj.kv.Preferences(), queries=8).save("cake.safetensors")
      >>> cache = sj.kv.preset("cake", window=4, size=8, calibration="cake.safetensors")
    """
    if not budget.measures:
        raise ValueError(f"{budget!r} measures nothing: it needs no calibration")
    ids, lengths = as_rows(text)
    length = require_one_length(lengths, "a calibration needs", least=2)
    state = read(model, init_state(model, Cascade(Full(length)), batch_size=len(ids)), ids)
    if (damaged := np.flatnonzero(~np.isfinite(np.asarray(state.hidden, np.float32)).all(axis=1))).size:
        raise not_finite(model, ids[damaged[0]], "the model's hidden states")
    asked = ids[:, -min(queries or length, length) :]
    return measured(model, state, budget, asked, stored=True)


def measured(model: Decoder, state: StreamState, budget: Budget, query: Rows, stored: bool) -> Calibration:
    """The same of streams, whose newest tokens (or those that would come next, if not `stored`) are asked.

    Raises:
      ValueError: queries that are not as `compact` describes, a cache whose tokens cannot be taken out.
    """
    own = budgeted_layers(model.config)
    works: list[Cache] = []
    for i, cache in enumerate(state.caches):
        if isinstance(cache, Recurrence):
            works.append(cache)
            continue
        if not isinstance(cache, Cascade):
            raise ValueError(f"a budget measures cascades of tiers, not {cache!r}")
        works.append(Measuring(cache, budget, stored) if i in own else Compaction(cache, cache, True, stored))
    found = through_layers(model, state, query, stored, works, [None] * len(works))
    tables = [np.asarray(found[i], np.float32) for i in own]
    width = max(table.shape[1] for table in tables)
    rows = [np.pad(table.mean(axis=0), (0, width - table.shape[1]), mode="edge") for table in tables]
    return Calibration.from_table(np.stack(rows), budget, fingerprint_in_any_dtype(model))
