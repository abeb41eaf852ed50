"""Budgets of whole models: at a prompt's end, against plain numbers, and in streams, by calibration."""

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.oracles import pooled, scored
from tests.streaming.compacting.test_compact import DENSE, LENGTH, QUERIES, prompt, shares, snapkv  # noqa: F401
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens, read_stream
from tests.streaming.tiny_sessions import BYTES, PROMPT, start

SIZE = 9
SNAP = sj.kv.Cascade(sj.kv.Window(QUERIES), sj.kv.Scored(SIZE, sj.kv.SnapKV(QUERIES, 3), every=8))
ADA = sj.kv.preset("ada_kv", window=QUERIES, size=SIZE, kernel=3, floor=0.25, every=8)
BUDGETS = [sj.kv.Preferences(tau1=2.0), sj.kv.Prefixes(), pytest.param(sj.kv.Density(), marks=pytest.mark.slow)]


def oracle(budget, attention) -> list[float]:
    """What a budget measures of one layer and stream, from the attention [K, G, C, T] of its last queries."""
    if isinstance(budget, sj.kv.Preferences):
        before = attention[..., : LENGTH - QUERIES]
        return [-(before * np.log(before + 1e-10)).sum(), before.var(axis=2, ddof=1).sum()]
    if isinstance(budget, sj.kv.Prefixes):
        got = np.sort(attention.sum(axis=(0, 1, 2)))[::-1]
        return (np.cumsum(got) / got.sum()).tolist()
    variance = attention.sum(axis=2).reshape(-1, LENGTH).var(axis=-1, ddof=1)
    return [((variance - variance.min()) / (variance.max() - variance.min() + 1e-6)).mean()]


def numbers(model, budget, found) -> list[np.ndarray]:
    """What a budget measures of every layer, from all its queries and keys."""
    scale = model.config.blocks[0].mixer.softmax_scale
    return [
        np.mean([oracle(budget, shares(q[row], k[row], scale, QUERIES)) for row in range(2)], axis=0)
        for q, k, _ in found
    ]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: type(budget).__name__)
def test_every_layer_is_measured(prompt, budget):  # noqa: F811
    model, tokens, _, found = prompt
    measured = sj.measure_budget(model, tokens, budget, queries=QUERIES)
    table = numbers(model, budget, found)
    np.testing.assert_allclose(measured.numbers, [row[: len(measured.table[0])] for row in table], rtol=2e-4)


@pytest.mark.usual("Preferences")
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: type(budget).__name__)
def test_layers_share_what_the_prompt_says(prompt, budget):  # noqa: F811
    """Sizes that follow from numbers of every layer, and in each layer the tokens that the score names."""
    model, tokens, state, found = prompt
    scale, table = model.config.blocks[0].mixer.softmax_scale, numbers(model, budget, found)
    sizes = budget.sizes(SIZE * 2, 2, np.array(table), most=LENGTH - QUERIES)
    new = sj.compact(model, state, SNAP, tokens[:, -QUERIES:], budget=budget)
    assert [cache.tiers[-1].size for cache in new.caches] == list(sizes)
    assert sum(sizes) == 2 * SIZE
    for size, (q, k, v), layer in zip(sizes, found, new.layers, strict=True):
        slots = layer[-1].slots
        for row in range(2):
            worth = snapkv(q[row], k[row], v[row], scale)
            for head in range(2):
                kept = np.asarray(slots.position)[row, head][np.asarray(slots.valid)[row, head]]
                assert len(kept) == size
                assert worth[head][kept].min() > np.delete(worth[head], kept).max() - 1e-5


def test_heads_share_a_layer(prompt):  # noqa: F811
    """The tokens that each head keeps of a prompt, in every row, against sorted lists."""
    model, tokens, state, found = prompt
    new, sizes = sj.compact(model, state, ADA, tokens[:, -QUERIES:]), []
    for (q, k, v), layer in zip(found, new.layers, strict=True):
        slots = layer[-1].slots
        position, valid = np.asarray(slots.position)[:, 0], np.asarray(slots.valid)
        for row in range(2):
            worth = snapkv(q[row], k[row], v[row], model.config.blocks[0].mixer.softmax_scale)
            lists = pooled.Stream(scored.Rule(2, 0, 0, SIZE, 8, lambda s, head, kept, w=worth: w[head], 1.0), 250)
            lists.kept = [[(k[row, i], v[row, i], i) for i in range(LENGTH - QUERIES)] for _ in range(2)]
            lists.choose()
            for head in range(2):
                mine = valid[row, head]
                assert sorted(position[row][mine].tolist()) == [e[2] for e in lists.kept[head]]
                np.testing.assert_allclose(
                    np.asarray(slots.k)[row, 0][mine], k[row, position[row][mine], head], atol=1e-4
                )
                sizes.append(mine.sum())
    assert sum(sizes) == 2 * 2 * 2 * SIZE
    assert len(set(sizes)) > 1


@pytest.mark.slow
def test_a_stream_of_heads_that_share_goes_on(prompt):  # noqa: F811
    model, tokens, state, _ = prompt
    new = sj.compact(model, state, ADA, tokens[:, -QUERIES:])
    _, logits = read_stream(model, new, random_tokens(2, 12, seed=1), [1])
    assert np.isfinite(logits).all()


def test_a_stream_has_the_sizes_that_were_measured(tmp_path):
    """From a file; another model is refused; layers with windows of their own have no part in the total."""
    model, tokens = build(LOCAL), random_tokens(1, 40)
    file = tmp_path / "cake.safetensors"
    measured = sj.measure_budget(model, tokens, sj.kv.Preferences(), queries=6)
    measured.save(file)
    cache = sj.kv.preset("cake", calibration=file, window=4, size=8, every=32)
    state = sj.init_state(model, cache)
    assert state.caches[0] == sj.kv.Cascade(sj.kv.Window(4))
    assert [c.tiers[-1].size for c in state.caches[1:]] == [8] * (len(state.caches) - 1)
    assert len(measured.table) == len(state.caches) - 1
    other = build(LOCAL, seed=5)
    with pytest.raises(
        ValueError, match=r"this calibration is of model [0-9a-f]{16}, and this one is [0-9a-f]{16}"
    ) as error:
        sj.init_state(other, cache)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_stream_under_a_budget_is_the_same_however_it_is_cut():
    """Heads compete in layers of sizes that fall."""
    model, tokens = build(GQA), random_tokens(2, 40)
    cache = sj.kv.preset("ada_kv", window=4, size=6, kernel=3, every=4, pyramid=True)
    whole, expected = read_stream(model, sj.init_state(model, cache, batch_size=2), tokens, [40])
    pieces, logits = read_stream(model, sj.init_state(model, cache, batch_size=2), tokens, [5])
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert jax.tree.map(np.shape, whole) == jax.tree.map(np.shape, pieces)
    sizes = [cache.tiers[-1].size for cache in whole.caches]
    assert (sum(sizes), sizes[0] > sizes[1]) == (12, True)


@pytest.mark.slow
def test_a_session_is_compacted_by_a_budget(tmp_path):
    model = build(BYTES)
    session = start(model, sj.kv.preset("dense", capacity=256))
    session.read(PROMPT)
    session.compact(sj.kv.preset("cake", window=4, size=8, kernel=3, every=4), PROMPT[-8:], stored=True)
    text = [*session.generate("So ", max_new_tokens=5)]
    session.save(tmp_path / "session")
    other = start(model, session.cache)
    other.load(tmp_path / "session")
    assert text
    assert other.tokens_seen == session.tokens_seen


@pytest.mark.quick
def test_what_cannot_be_divided_is_refused(prompt):  # noqa: F811
    model, tokens, state, _ = prompt
    cake = sj.kv.preset("cake", window=QUERIES, size=SIZE, every=8)
    for run, message in (
        (lambda: sj.init_state(model, cake), "Preferences measures a model: give it a calibration, sj.measure_budget"),
        (lambda: sj.compact(model, state, cake), "Preferences.* measures attention: give query="),
        (lambda: sj.compact(model, state, (DENSE, DENSE), budget=sj.kv.Pyramid()), "a budget divides one cascade over"),
        (
            lambda: sj.measure_budget(model, tokens, sj.kv.Pyramid()),
            "Pyramid.* measures nothing: it needs",
        ),
        (lambda: sj.measure_budget(model, tokens[:, :1], sj.kv.Density()), "a calibration needs rows of one length"),
        (lambda: sj.compact(model, state, sj.kv.preset("window"), budget=sj.kv.Pyramid()), "one Scored tier"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            run()
        assert "\n" not in str(error.value)
