"""Layers whose heads cache by different rules are read in parts that layers share, and give what whole layers give."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv import TOVA, Cascade, Compensation, Full, HeadGroups, Pages, Scored, SharedFront, Sink, Window
from streamjax.streaming import scan
from streamjax.streaming.by_layer import grouped_heads, layerwise
from tests.streaming.tiny_models import GQA, build, random_tokens

PARTS = grouped_heads.asked, grouped_heads.group_over, grouped_heads.continued
SHARED = grouped_heads.asked, grouped_heads.front_over, grouped_heads.behind_over, grouped_heads.continued
FAR, NEAR = Cascade(Full(64)), Cascade(Sink(2), Window(6))
HEADS = GQA.replace(num_heads=6, num_kv_heads=3, num_layers=4)


def groups(*far: int, rules: tuple[Cascade, Cascade] = (FAR, NEAR)) -> HeadGroups:
    return HeadGroups((far, rules[0]), (tuple(h for h in range(3) if h not in far), rules[1]))


@pytest.mark.slow
def test_few_programs_for_layers_with_any_number_of_heads():
    """Four layers of which 0 to 3 heads look far: one program up to attention, one behind it, and six of groups."""
    model = build(HEADS)
    caches = [groups(), groups(1), groups(0, 2), groups(0, 1, 2)]
    for part in (*PARTS, layerwise.layer_over):
        part.clear_cache()  # another test may have read such chunks
    sj.read(model, sj.init_state(model, caches), random_tokens(1, 11), 11)
    assert [part._cache_size() for part in PARTS] == [1, 6, 1]
    assert layerwise.layer_over._cache_size() == 0


def test_few_programs_where_layers_share_a_front():
    """The same layers with sinks and windows of all heads together: what is behind them is all that differs."""
    front = Sink(2, reach=2**30), Window(4)
    rules = Cascade(*front, Pages(2, 16, 3)), Cascade(*front)
    caches = [SharedFront(2, *groups(*far, rules=rules).groups) for far in ((), (1,), (0, 2), (0, 1, 2), (0, 1))]
    for part in (*PARTS, *SHARED, layerwise.layer_over):
        part.clear_cache()
    model = build(HEADS.replace(num_layers=5))
    sj.read(model, sj.init_state(model, caches), random_tokens(1, 11), 11)
    assert [part._cache_size() for part in SHARED] == [1, 1, 3, 1]
    assert layerwise.layer_over._cache_size() == grouped_heads.group_over._cache_size() == 0


RULES = {
    "streaming": (FAR, NEAR),
    "razor": (FAR, Cascade(Sink(2, reach=2**30), Window(4), Compensation())),
    "pages": (Cascade(Sink(2), Window(4), Pages(2, 16, 3)), NEAR),
    "front": (Cascade(Sink(2, 2**30), Window(4), Pages(2, 16, 3)), Cascade(Sink(2, 2**30), Window(4))),
    "noted": (Cascade(Window(4), Scored(6, TOVA(), every=4)), NEAR),
}


@pytest.mark.parametrize(
    ("rules", "config", "block"),
    [
        pytest.param(
            "streaming",
            {"position": "alibi", "alibi_slopes": (0.7, 0.5, 0.35, 0.2, 0.1, 0.05)},
            256,
            marks=pytest.mark.slow,
        ),
        (
            "streaming",
            {"attention_softcap": 3.0},
            4,
        ),  # the window is shorter than a chunk: each group reads the chunk itself
        pytest.param("razor", {}, 256, marks=pytest.mark.slow),
        pytest.param("pages", {}, 256, marks=pytest.mark.slow),
        ("front", {"attention_softcap": 3.0}, 256),
        pytest.param("noted", {}, 256, marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_layer_are_the_layer(monkeypatch, rules, config, block):
    """Two streams of unequal length over two chunks at once: outputs and states of a program with all of the layer."""
    monkeypatch.setattr("streamjax.kv.cascade.QUERY_BLOCK", block)
    model = build(HEADS.replace(num_layers=1, **config))
    cache = groups(2, 0, rules=RULES[rules])
    if rules == "front":
        cache = SharedFront(2, *cache.groups)
    key = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(key[0], (2, 2, 9, HEADS.d_model))
    count, start = np.array([[9, 9], [7, 2]]), np.array([[5, 0], [14, 9]])
    places = layerwise.Places(
        jnp.asarray(start[..., None] + np.arange(9), jnp.uint32),
        jnp.asarray(np.arange(9) < count[..., None]),
        jnp.asarray(start, jnp.int32),
        None,
    )
    found = []
    for apart in (True, False):
        state = sj.init_state(model, (cache,), 2)
        fresh, (renumbered, order) = state.layers[0], cache.renumbered()
        if apart:
            assert grouped_heads.shares_parts(model.layers[0], cache, state)
            one = grouped_heads.read_grouped(model.layers[0], None, x, fresh, places, cache, state.span, None)
        else:
            one = layerwise.layer_over(
                model.layers[0], None, x, fresh, places, renumbered, state.span, None, jnp.array(order)
            )
        found.append(one)
    there = np.asarray(places.valid)
    np.testing.assert_allclose(np.asarray(found[0][0])[there], np.asarray(found[1][0])[there], atol=1e-5)
    mine, theirs = (jax.tree.leaves(state) for _, state in found)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_lies_between_parts_counts_in_how_many_chunks_are_read_at_once(monkeypatch):
    """A layer in parts has queries, keys and values of all chunks of a call at once: 162 numbers a token beside 16."""
    model = build(HEADS)
    monkeypatch.setattr(scan, "HIDDEN_BYTES", scan.SCAN_CHUNKS * 4 * 100)
    whole, parted = (sj.init_state(model, cache) for cache in (FAR, [groups(0)] * 4))
    assert scan._group(model, whole, 1) == scan.SCAN_CHUNKS
    assert scan._group(model, parted, 1) == 1
    monkeypatch.setattr(scan, "HIDDEN_BYTES", scan.SCAN_CHUNKS * 4 * (16 + 3 * 9 * 6))
    assert scan._group(model, parted, 1) == scan.SCAN_CHUNKS


def test_a_group_keeps_its_donated_cache_in_place(untyped):
    """Every byte of its state and of the answer is aliased, and no instruction copies a cache."""
    model = build(HEADS.replace(num_layers=1, head_dim=32))
    far, near = Cascade(Full(1024)), Cascade(Sink(4), Window(1020))
    cache = groups(0, 2, rules=(far, near))
    state = sj.init_state(model, (cache,))
    places = layerwise.Places(
        jnp.zeros((1, 1, 4), jnp.uint32), jnp.ones((1, 1, 4), bool), jnp.zeros((1, 1), jnp.int32), None
    )
    x = jnp.zeros((1, 1, 4, HEADS.d_model))
    chunks, answer = grouped_heads.asked(model.layers[0], None, x, places, state.span, None, 0)
    for (heads, cascade), part in zip(cache.groups, state.layers[0], strict=True):
        some = np.zeros(len(heads), np.int32), np.zeros(3, np.int32)
        compiled = grouped_heads.group_over.lower(part, answer, chunks, *some, cascade, True).compile()
        given = sum(leaf.nbytes for leaf in jax.tree.leaves((part, answer)))
        assert compiled.memory_analysis().alias_size_in_bytes == given
        copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
        assert all(4 * np.prod([int(n) for n in shape.split(",")]) < part[0].k.nbytes / 2 for shape in copied)


def test_a_shared_front_and_what_is_behind_it_stay_in_place(untyped):
    """Every byte of their states, and of the answer that what is behind adds to, is aliased; no cache is copied."""
    model = build(HEADS.replace(num_layers=1, head_dim=32))
    front = Sink(4, reach=2**30), Window(1020)
    cache = SharedFront(2, ((0, 2), Cascade(*front, Pages(16, 1024, 8))), ((1,), Cascade(*front)))
    state = sj.init_state(model, (cache,))
    places = layerwise.Places(
        jnp.zeros((1, 1, 4), jnp.uint32), jnp.ones((1, 1, 4), bool), jnp.zeros((1, 1), jnp.int32), None
    )
    x = jnp.zeros((1, 1, 4, HEADS.d_model))
    chunks, answer = grouped_heads.asked(model.layers[0], None, x, places, state.span, None, 0)
    first, behind, _ = state.layers[0]
    reaches = jnp.asarray(cache.reaches)
    fallen = jax.eval_shape(lambda *x: grouped_heads.front_over._function(*x, cache.shared), first, chunks, reaches)[2]
    some = np.zeros(2, np.int32), np.zeros(3, np.int32)
    rest = cache.behind_front(cache.groups[0][1])
    for given, lowered in (
        ((first,), grouped_heads.front_over.lower(first, chunks, reaches, cache.shared)),
        ((behind, answer), grouped_heads.behind_over.lower(behind, answer, chunks, fallen, *some, rest)),
    ):
        compiled = lowered.compile()
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(given))
        assert compiled.memory_analysis().alias_size_in_bytes == kept
        copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
        whole = max(leaf.nbytes for leaf in jax.tree.leaves(given[0]))
        assert all(4 * np.prod([int(n) for n in shape.split(",")]) < whole / 2 for shape in copied)
