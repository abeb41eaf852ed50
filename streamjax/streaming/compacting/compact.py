"""`compact`: at a caller's word, what streams hold is laid out anew by another cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.kv.budgets.budget import Budget, scored_tier
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.compaction import Compaction, GroupedCompaction
from streamjax.kv.head_groups import HeadGroups
from streamjax.kv.layer_caches.recurrence import Recurrence
from streamjax.kv.layouts.across_layers import AcrossLayers
from streamjax.kv.layouts.lazy_layers import NearShare
from streamjax.kv.shared_front import SharedFront
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window
from streamjax.models.decoder import Decoder
from streamjax.parallel.multiprocess import on_host
from streamjax.streaming.by_layer.reading_apart import refuse_apart
from streamjax.streaming.compacting.across_layers import compact_across
from streamjax.streaming.compacting.measure_budget import measured
from streamjax.streaming.compacting.reading_layers import through_layers
from streamjax.streaming.state import (
    StreamState,
    budgeted_layers,
    layer_caches,
    require_own_calibration,
    rotated_otherwise,
)
from streamjax.streaming.token_rows import Rows, as_rows, require_one_length


def compact(
    model: Decoder,
    state: StreamState,
    cache: Cache | Sequence[Cache],
    query: Rows | None = None,
    *,
    stored: bool = True,
    queries: Sequence[Rows] = (),
    budget: Budget | None = None,
    group: int = 1,
) -> StreamState:
    """The same streams under another cache, for instance at the end of a prompt or between two turns.

    Each tier of the new cache takes of all that is held what it keeps; a `Scored` tier makes one choice. So
    `compact(model, state, sj.kv.preset("snapkv", ...), query=prompt[:, -32:])` after reading a prompt into a `dense`
    cache is SnapKV as published. Positions stay; what a cache does not take is gone. The state is not donated.

    Scores that choose by attention need queries. States keep no queries, which would cost every stream memory that few
    ever use; the tokens in `query` are read again instead, from the old cache and without being stored, which over a
    dense cache gives the very same queries. `H2O` over a cache that has noted its attention needs none.

    Args:
      model: the model that read the streams.
      state: where they stand.
      cache: the new cache, for all layers or one a layer, or a rule for groups of layers (`AcrossLayers`); layers with
        windows of their own keep those, and recurrent ones their states.
      query: ids of the tokens whose attention decides, one row a stream, all of one length.
      stored: the queries are the newest tokens that the streams have read; otherwise tokens that would come next, such
        as a question about what was read.
      queries: several such questions instead of `query`, each asked by itself; what they say counts together.
        `reconstruction` makes those of KVzip.
      budget: divides the size of the cache's `Scored` tier, times the number of layers, over the layers or the heads;
        one that measures does so of the attention of the queries. New sizes are new programs to compile.
      group: so many layers with one cache, in their order, keep the positions that the first of them chooses, each with
        keys and values of its own. WindowKV shares choices so, which spares the others' scores.

    Raises:
      ValueError: a cache whose tokens cannot be taken out, or into which they do not fit; a score that wants a query;
        rows that are not as described; a group without two layers that could share a choice; a model with a chunk
        memory, or with a rotation that changes with the cache;
        tokens to read again, by a model with recurrent layers; tokens on a second mesh.

    Example:
      >>> state = sj.read(model, state, prompt)
      >>> state = sj.compact(model, state, sj.kv.preset("snapkv", window=4, size=8), query=prompt[:, -4:])
      >>> state.caches[0].tiers[1].size  # of the 12 tokens in front of the last 4 each head keeps 8
      8
    """
    refuse_apart(state, "compact")
    if model.config.hsa is not None:
        raise ValueError("a model with a chunk memory keeps it as it is: compact does not know it")
    if model.remembered is not None:
        raise ValueError("a model with a side network keeps what it reads as it is: compact does not know it")
    if isinstance(cache, AcrossLayers):
        if query is not None or queries or budget is not None or group != 1:
            raise ValueError(f"{type(cache).__name__} takes all that layers hold: give no query, budget or group")
        return compact_across(model, state, cache)
    if query is not None and queries:
        raise ValueError("give compact a query or several queries, not both")
    asked, stored = query is not None or bool(queries), stored and not queries
    if budget is not None:
        if not isinstance(cache, Cascade):
            raise ValueError(f"a budget divides one cascade over all layers, not {cache!r}")
        cache = Budgeted(cache, budget)
    require_own_calibration(model, cache)
    if isinstance(cache, Budgeted):
        cache = _for_these_streams(model, state, cache, queries if query is None else (query,), stored)
    # heads that share a front come apart: what each group kept so far may differ
    caches = tuple(new.plain() if isinstance(new, SharedFront) else new for new in layer_caches(model.config, cache))
    works = [_compaction(old, new, asked, stored) for old, new in zip(state.caches, caches, strict=True)]
    leaders = _leaders(works, group)
    span = max(new.span for new in caches)
    if (layer := rotated_otherwise(model.config, state.span, span)) is not None:
        raise ValueError(f"layer {layer} rotates keys by what fits the cache: they cannot go to one of another span")
    seen = on_host(state.seen)
    end = min((new.capacity for new in caches if new.capacity is not None), default=None)
    if end is not None and seen.max() > end:
        raise ValueError(f"a stream has read {seen.max():,} tokens, and the new cache ends after {end:,}")
    said: list[Any] = [None] * len(works)
    for other in queries[:-1]:
        asking = [work if isinstance(work, Recurrence) else dataclasses.replace(work, more=True) for work in works]
        said = through_layers(model, state, other, stored, asking, said)
    layers = through_layers(model, state, queries[-1] if queries else query, stored, works, said, leaders)
    # What is as it was is copied: both states can be read on, and reading consumes a state.
    kept = jax.tree.map(jnp.copy, dataclasses.replace(state, layers=()))
    same = [isinstance(work, Recurrence | GroupedCompaction) or work.old == work.new for work in works]
    layers = [jax.tree.map(jnp.copy, x) if is_same else x for is_same, x in zip(same, layers, strict=True)]
    return dataclasses.replace(kept, layers=tuple(layers), caches=caches, span=span).placed()


def _for_these_streams(
    model: Decoder, state: StreamState, cache: Budgeted, queries: Sequence[Rows], stored: bool
) -> Budgeted:
    """The cache with what its budget measures of these streams, on the mean over queries, and what there is to keep.

    Raises:
      ValueError: a budget that measures, and no query.
    """
    if cache.unmeasured:
        if not queries:
            raise ValueError(f"{cache.budget!r} measures attention: give query=, such as the newest tokens of streams")
        found = [measured(model, state, cache.budget, query, stored) for query in queries]
        table = np.mean([one.numbers for one in found], axis=0)
        cache = dataclasses.replace(cache, calibration=Calibration.from_table(table, cache.budget, found[0].model))
    held = [min(int(on_host(state.seen).max()), state.caches[i].slots) for i in budgeted_layers(model.config)]
    beside = cache.cascade.slots - scored_tier(cache.cascade).slots
    return dataclasses.replace(cache, most=max(min(held, default=1) - beside, 1))


def _leaders(works: Sequence[Cache], group: int) -> dict[int, int]:
    """The layer whose choice a layer takes, for those that take another's.

    Raises:
      ValueError: a group of none, or no two layers that choose among the same tokens in the same way.
    """
    if group < 1:
        raise ValueError(f"group is {group}: so many layers share a choice, at least 1")
    alike: dict[Cache, list[int]] = {}
    for i, work in enumerate(works):
        scored = (
            [type(tier) for tier in work.new.tiers if isinstance(tier, Scored)] if isinstance(work, Compaction) else []
        )
        if scored and set(scored) == {Scored}:  # other rules hold what they chose in other ways
            alike.setdefault(work, []).append(i)
    leaders = {i: layers[j - j % group] for layers in alike.values() for j, i in enumerate(layers) if j % group}
    if group > 1 and not leaders:
        raise ValueError(f"group is {group}, but no two layers choose among the same tokens by the same score and size")
    return leaders


def _compaction(old: Cache, new: Cache, asked: bool, stored: bool) -> Compaction | GroupedCompaction | Recurrence:
    stored = stored or not asked
    match old, new:
        case Recurrence(), _:
            return old
        case Cascade(), Cascade():
            return Compaction(old, new, asked, stored)
        case ((Cascade() | HeadGroups()), HeadGroups()):
            return GroupedCompaction(old, new, asked, stored)
        case HeadGroups(), Cascade():
            raise ValueError(f"groups of heads hold different tokens: give each a cascade in HeadGroups, not {new!r}")
    other = new if isinstance(old, Cascade | HeadGroups) else old
    raise ValueError(f"only cascades of tiers and groups of heads with them are compacted, not {other!r}")


def reconstruction(
    tokens: Rows, chunk: int = 2048, request: Sequence[int] = (), again: Sequence[int] | None = None, lead: int = 8
) -> list[np.ndarray]:
    """Queries that ask a model to repeat what it has read, chunk by chunk (KVzip, Kim et al., 2505.23416).

    Args:
      tokens: what was read, rows of one length.
      chunk: tokens that are repeated at a time.
      request: ids in front of the first chunk, such as "Repeat the previous context exactly."
      again: ids in front of the others, such as "Repeat the part of the previous context exactly, starting with";
        `request` where None.
      lead: tokens of the chunk before that follow `again`.

    Raises:
      ValueError: rows of several lengths or of none; a chunk of no tokens.

    Example:
      >>> state = sj.read(model, state, prompt)
      >>> queries = sj.reconstruction(prompt, chunk=8, request=tokenizer.encode("Repeat:"))
      >>> state = sj.compact(model, state, sj.kv.preset("kvzip", sinks=2, size=8), queries=queries)
    """
    ids, lengths = as_rows(tokens)
    require_one_length(lengths, "what is to be repeated needs")
    if chunk < 1 or lead < 0:
        raise ValueError(f"reconstruction: chunk is {chunk} and lead is {lead}: at least 1, and 0")
    found = []
    for start in range(0, ids.shape[1], chunk):
        words = request if start == 0 or again is None else again
        asks = np.broadcast_to(np.asarray(words, np.int64), (len(ids), len(words)))
        found.append(np.concatenate((asks, ids[:, max(start - lead, 0) : start + chunk]), axis=1))
    return found


def lazy_layers(
    model: Decoder,
    state: StreamState,
    query: Rows,
    *,
    threshold: float = 0.9,
    sinks: int = 4,
    window: int = 1024,
    stored: bool = True,
) -> tuple[Cache, ...]:
    """One cache a layer: sinks and a window where the layer looks at little else, and as it is in the others.

    SimLayerKV (Zhang et al., 2410.13846): a layer is lazy if the attention that the queries give to the first `sinks`
    and the newest `window` tokens is more than `threshold` of all, on average over heads, queries and streams. What
    comes back is for `compact`, or for `init_state` of other streams.

    Args:
      model, state, query, stored: see `compact`; cascades alone are asked.
      threshold: in 0..1. The paper's: 0.9 for Llama 3, 0.65 for Llama 2, 0.8 for Mistral.
      sinks, window: what a lazy layer keeps. Keys of sinks stay at their true distance.

    Raises:
      ValueError: what `compact` refuses of a query; a threshold or sizes that make no sense.

    Example:
      >>> state = sj.read(model, state, prompt)
      >>> caches = sj.lazy_layers(model, state, prompt[:, -4:], threshold=0.65, sinks=2, window=4)
      >>> state = sj.compact(model, state, caches)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"lazy_layers: threshold is {threshold}: it must be from 0 to 1, a share of attention")
    near = Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window))
    works: list[NearShare | Recurrence] = []
    for kept in state.caches:
        if isinstance(kept, Recurrence):
            works.append(kept)
            continue
        if not isinstance(kept, Cascade):
            raise ValueError(f"only cascades of tiers can be asked what their layer looks at, not {kept!r}")
        works.append(NearShare(kept, sinks, window, stored))
    shares = through_layers(model, state, query, stored, works, [None] * len(works))
    pairs = zip(works, shares, strict=True)
    lazy = [not isinstance(work, Recurrence) and float(jnp.mean(share)) > threshold for work, share in pairs]
    return tuple(near if is_lazy else kept for is_lazy, kept in zip(lazy, state.caches, strict=True))
