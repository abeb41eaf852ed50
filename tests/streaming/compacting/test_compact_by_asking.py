"""What queries say of a whole prompt, in several pieces (KVzip), of values (CriticalKV) and of layers (SimLayerKV)."""

import numpy as np
import pytest

import streamjax as sj
from tests.streaming.compacting.test_compact import DENSE, LENGTH, QUERIES, prompt, shares, snapkv  # noqa: F401
from tests.streaming.tiny_models import GQA, build, parts_of_layers, random_tokens, read_stream

SIZE = 9


def kept(state, layer, row, head) -> np.ndarray:
    slots = state.layers[layer][-1].slots
    own = min(head, slots.position.shape[1] - 1)
    return np.asarray(slots.position)[row, own][np.asarray(slots.valid)[row, own]]


@pytest.mark.slow
def test_a_prompt_that_is_repeated_in_chunks_chooses_as_kvzip_does(prompt):  # noqa: F811
    """Each chunk is read behind the prompt by itself: the shares are those of a forward pass over both."""
    model, tokens, state, _ = prompt
    request = [3, 5, 8]
    asked = sj.reconstruction(tokens, 24, request, lead=2)
    assert [x.shape for x in asked] == [(2, 27), (2, 29)]
    np.testing.assert_array_equal(asked[1], np.concatenate((np.tile(request, (2, 1)), tokens[:, 22:]), axis=1))
    cache = sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Scored(SIZE, sj.kv.KVzip(), every=8))
    new = sj.compact(model, state, cache, queries=asked)
    scale, most = model.config.blocks[0].mixer.softmax_scale, [0.0, 0.0]
    for queries in asked:
        for i, (q, k, _) in enumerate(parts_of_layers(model, np.concatenate((tokens, queries), axis=1))):
            got = [shares(q[row], k[row], scale, queries.shape[1]).max(axis=(1, 2)) for row in range(2)]
            most[i] = np.maximum(most[i], np.array(got)[..., :LENGTH])
    for layer in range(2):
        for row in range(2):
            for head in range(2):
                mine, worth = kept(new, layer, row, head), most[layer][row, head]
                left = np.delete(worth, [0, 1, *mine])
                assert len(mine) == SIZE
                assert worth[mine].min() > left.max() - 1e-5
    _, logits = read_stream(model, new, random_tokens(2, 9, seed=1), [1])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "score", [sj.kv.H2O(), pytest.param(sj.kv.ExpectedAttention(ahead=4), marks=pytest.mark.slow)], ids=repr
)
def test_several_questions_count_together(prompt, score):  # noqa: F811
    """Sums of attention add up, and moments of queries too; one question alone is `query`."""
    model, _, state, _ = prompt
    questions = [random_tokens(2, 5, seed=seed) for seed in (4, 5)]
    cache = sj.kv.Cascade(sj.kv.Scored(SIZE, score, every=8))
    single = sj.compact(model, state, cache, questions[0], stored=False)
    again = sj.compact(model, state, cache, queries=questions[:1])
    both, twice = (sj.compact(model, state, cache, queries=some) for some in (questions, questions[:1] * 2))
    for mine, theirs in ((single, again), (single, twice)):
        np.testing.assert_array_equal(mine.layers[1][0].slots.position, theirs.layers[1][0].slots.position)
    assert (np.asarray(single.layers[0][0].slots.position) != np.asarray(both.layers[0][0].slots.position)).any()


def test_values_are_weighed_by_what_they_move(prompt):  # noqa: F811
    """CriticalKV: half by SnapKV, the others by it times the L1 norm behind the output projection."""
    model, tokens, state, found = prompt
    cache = sj.kv.preset("criticalkv", window=QUERIES, size=SIZE, kernel=3, every=8)
    new = sj.compact(model, state, cache, tokens[:, -QUERIES:])
    for i, (q, k, v) in enumerate(found):
        weights = np.asarray(model.layer(i).mixer.projections.out[...], np.float64)
        for row in range(2):
            worth = snapkv(q[row], k[row], v[row], model.config.blocks[0].mixer.softmax_scale)
            norms = np.abs(np.einsum("skd,kgde->kgse", v[row], weights)).sum(-1).mean(axis=1)[:, : LENGTH - QUERIES]
            for head in range(2):
                first = np.argsort(-worth[head])[: SIZE // 2]
                second = (worth[head] / worth[head].sum() + 1e-4) * norms[head]
                second[first] = np.inf
                assert sorted(kept(new, i, row, head)) == sorted(np.argsort(-second)[:SIZE])


def test_a_stream_weighs_values_however_it_is_cut():
    """Token by token, and in chunks with the heads apart and in another order."""
    model, tokens = build(GQA.replace(num_layers=1)), random_tokens(1, 30)
    cache = sj.kv.preset("criticalkv", window=3, size=6, every=4)
    groups = sj.kv.HeadGroups(((1,), cache), ((0,), cache))
    _, whole = read_stream(model, sj.init_state(model, cache), tokens, [1])
    _, apart = read_stream(model, sj.init_state(model, groups), tokens, [10])
    np.testing.assert_allclose(whole, apart, atol=1e-4)


def test_lazy_layers_keep_sinks_and_a_window(prompt):  # noqa: F811
    model, tokens, state, found = prompt
    near = []
    for q, k, _ in found:
        got = [shares(q[row], k[row], model.config.blocks[0].mixer.softmax_scale, 3) for row in range(2)]
        near.append(float(np.mean([x[..., :2].sum(-1).mean() + x[..., -10:].sum(-1).mean() for x in got])))
    asks = {"sinks": 2, "window": 10}
    below, above = min(near) - 1e-4, min(near) + 1e-4
    lazy = sj.kv.Cascade(sj.kv.Sink(2, reach=2**30), sj.kv.Window(10))
    assert sj.lazy_layers(model, state, tokens[:, -3:], threshold=below, **asks) == (lazy, lazy)
    caches = sj.lazy_layers(model, state, tokens[:, -3:], threshold=above, **asks)
    assert sorted(cache == lazy for cache in caches) == [False, True]
    assert sj.compact(model, state, caches).cache_bytes < state.cache_bytes
    for options, message in (
        ({"threshold": 1.5}, "threshold is 1.5: it must be from 0 to 1"),
        ({"sinks": 0}, "size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sj.lazy_layers(model, state, tokens[:, -3:], **options)


@pytest.mark.quick
def test_what_cannot_be_asked_is_refused(prompt):  # noqa: F811
    model, tokens, state, _ = prompt
    with pytest.raises(ValueError, match="a query or several queries, not both"):
        sj.compact(model, state, DENSE, tokens[:, -2:], queries=[tokens])
    with pytest.raises(ValueError, match="needs rows of one length"):
        sj.reconstruction([[1, 2], [3]])
    with pytest.raises(ValueError, match="chunk is 0"):
        sj.reconstruction(tokens, 0)
    with pytest.raises(ValueError, match=r"CriticalKV\.first is 2: it must be a number from 0 to 1"):
        sj.kv.CriticalKV(sj.kv.H2O(), 2)
