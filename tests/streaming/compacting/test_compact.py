"""Streams that are laid out anew by another cache: what stays, against plain lists and against streams that kept it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from tests.oracles import merging, scored
from tests.oracles.scored import lag_worth
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens, read_prompt, read_stream
from tests.streaming.tiny_sessions import BYTES, PROMPT, start

LENGTH, QUERIES, SIZE = 48, 6, 9
DENSE = sj.kv.preset("dense", capacity=64)
ONE_LAYER = GQA.replace(num_layers=1)


@pytest.fixture(scope="module")
def prompt():
    """A model, two prompts that it has read into a dense cache, and of each layer queries, keys and values."""
    return read_prompt(LENGTH)


def shares(q, k, scale, count) -> np.ndarray:
    """The attention [K, G, count, T] of one stream's last `count` queries."""
    heads, length = k.shape[1], len(k)
    grouped = q[-count:].reshape(count, heads, -1, q.shape[-1])
    logits = np.einsum("ckgd,skd->kgcs", grouped, k) * scale
    seen = np.arange(length) <= np.arange(length - count, length)[:, None]
    weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True)


def snapkv(q, k, v, scale):
    """kvpress's and the paper's: summed over the window, pooled with zeros outside, summed over the group."""
    got = shares(q, k, scale, QUERIES).sum(axis=(1, 2))[:, : LENGTH - QUERIES]
    padded = np.pad(got, ((0, 0), (1, 1)))
    return padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]


def tova(q, k, v, scale):
    got = shares(q, k, scale, 1).sum(axis=(0, 1, 2))
    return np.broadcast_to(got, (k.shape[1], LENGTH))


def knorm(q, k, v, scale):
    return -np.linalg.norm(k, axis=-1).T


def keydiff(q, k, v, scale):
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    mean = unit.mean(axis=0, keepdims=True)
    return -((unit * mean).sum(-1) / np.linalg.norm(mean, axis=-1)).T


def lagkv(q, k, v, scale):
    """Blocks of 8 behind nothing: each measured by the next; the last whole one and what follows it stay."""
    found = np.full((k.shape[1], len(k)), np.inf)
    for first in range(0, len(k) - 15, 8):
        for head in range(k.shape[1]):
            blocks = [[np.array([k[i, head], v[i, head]]) for i in range(at, at + 8)] for at in (first, first + 8)]
            worth = lag_worth(blocks)
            found[head, first : first + 8] = (np.argsort(np.argsort(worth)) + 1) / 8
    return found


def lagkv_behind_sinks(q, k, v, scale):
    """The same behind three tokens that stay whatever they are: blocks begin with the fourth."""
    rest = lagkv(q, k[3:], v[3:], scale)
    return np.concatenate((np.full((k.shape[1], 3), -np.inf), rest), axis=1)


def expected_attention(q, k, v, scale, covariance=True):
    """kvpress's, over all queries of the prompt but the first four."""
    steps = GQA.rope.theta ** (-np.arange(3) / 3)
    angles = (LENGTH + np.arange(16))[:, None] * steps
    cos, sin = np.cos(angles).mean(0), np.sin(angles).mean(0)
    turn = np.block([[np.diag(cos), -np.diag(sin)], [np.diag(sin), np.diag(cos)]])
    found = np.zeros((k.shape[1], LENGTH))
    for h in range(q.shape[1]):
        head = h * k.shape[1] // q.shape[1]
        place = np.arange(LENGTH)[:, None] * steps
        back = np.concatenate(
            (
                q[:, h, :3] * np.cos(place) + q[:, h, 3:] * np.sin(place),
                q[:, h, 3:] * np.cos(place) - q[:, h, :3] * np.sin(place),
            ),
            axis=1,
        )[4:]
        mean, spread = turn @ back.mean(0), turn @ np.cov(back.T, bias=True) @ turn.T
        logits = k[:, head] @ mean * scale
        if covariance:
            logits += 0.5 * scale**2 * np.einsum("sd,de,se->s", k[:, head], spread, k[:, head])
        weights = np.exp(logits - logits.max())
        found[head] += weights / weights.sum() * k.shape[1] / q.shape[1]
    return found * np.linalg.norm(v, axis=-1).T


def in_chunks(got, size, best=None):
    """The mean of the best of each chunk of neighbours, for all heads together."""
    together, found = got.mean(axis=0), np.zeros(got.shape[1])
    for first in range(0, len(found), size):
        found[first : first + size] = np.mean(np.sort(together[first : first + size])[::-1][:best])
    return np.broadcast_to(found, got.shape)


def chunkkv(q, k, v, scale):
    return in_chunks(shares(q, k, scale, QUERIES).sum(axis=(1, 2))[:, : LENGTH - QUERIES], 4)


def windowkv(q, k, v, scale):
    return in_chunks(shares(q, k, scale, QUERIES).sum(axis=(1, 2))[:, : LENGTH - QUERIES], 8, 4)


def finch(q, k, v, scale):
    seen = np.arange(LENGTH - QUERIES, LENGTH) + 1
    return (shares(q, k, scale, QUERIES) * seen[:, None]).sum(axis=(1, 2))


def kvzip(q, k, v, scale):
    return shares(q, k, scale, QUERIES).max(axis=(1, 2))


def curdkv(q, k, v, scale):
    """kvpress's, in windows of 8."""
    found = 1.0
    for part in (k, v):
        squares = (part**2).sum(-1).T.reshape(-1, LENGTH // 8, 8)
        found = found * (squares / squares.sum(-1, keepdims=True)).reshape(-1, LENGTH)
    return found


def leverage(q, k, v, scale):
    """Of keys before rotation, centred."""
    angle = np.arange(LENGTH)[:, None, None] * GQA.rope.theta ** (-np.arange(3) / 3)
    first, second = k[..., :3], k[..., 3:]
    raw = np.concatenate(
        (first * np.cos(angle) + second * np.sin(angle), second * np.cos(angle) - first * np.sin(angle)), axis=-1
    )
    x = (raw - raw.mean(axis=0)).swapaxes(0, 1)
    gram = x.swapaxes(1, 2) @ x
    ridge = 1e-4 * np.trace(gram, axis1=1, axis2=2)[:, None, None] / 6 * np.eye(6)
    return np.einsum("ksd,kde,kse->ks", x, np.linalg.inv(gram + ridge), x)


def qfilters(q, k, v, scale):
    found = np.zeros((k.shape[1], LENGTH))
    for h in range(q.shape[1]):
        head, first = h * k.shape[1] // q.shape[1], np.linalg.svd(q[:, h])[2][0]
        found[head] += k[:, head] @ first * np.sign(first @ q[:, h].mean(axis=0)) * k.shape[1] / q.shape[1]
    return found


CASES = {
    "lagkv": (sj.kv.Cascade(sj.kv.Scored(26, sj.kv.LagKV(lag=8), every=8)), lagkv),
    "lagkv_behind_sinks": (sj.kv.preset("lagkv", sinks=3, size=24, lag=8), lagkv_behind_sinks),
    "expected_attention": (
        sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.ExpectedAttention(ahead=16), every=8)),
        expected_attention,
    ),
    "expected_attention_by_means": (
        sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.ExpectedAttention(ahead=16, covariance=False), every=8)),
        partial(expected_attention, covariance=False),
    ),
    "snapkv": (sj.kv.Cascade(sj.kv.Window(QUERIES), sj.kv.Scored(SIZE, sj.kv.SnapKV(QUERIES, 3), every=8)), snapkv),
    "tova": (sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.TOVA(), per_head=False, every=8)), tova),
    "knorm": (sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.KNorm(), every=8)), knorm),
    "keydiff": (sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.KeyDiff(), every=8)), keydiff),
    "chunkkv": (sj.kv.preset("chunkkv", window=QUERIES, size=12, chunk=4, every=8), chunkkv),
    "windowkv": (sj.kv.preset("windowkv", suffix=QUERIES, size=16, every=8), windowkv),
    "finch": (sj.kv.preset("finch", size=SIZE, window=8, every=8), finch),
    "kvzip": (sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.KVzip(), every=8)), kvzip),
    "curdkv": (sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.CUR(8), every=8)), curdkv),
    "leverage": (sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.Leverage(), every=8)), leverage),
    "qfilters": (sj.kv.Cascade(sj.kv.Scored(SIZE, sj.kv.QFilters(), every=8)), qfilters),
}
ASKED = dict.fromkeys(("snapkv", "tova", "chunkkv", "windowkv", "finch", "kvzip"), slice(-QUERIES, None))
ASKED |= dict.fromkeys(("expected_attention", "expected_attention_by_means", "qfilters"), slice(None))
STREAMED = ("lagkv_behind_sinks", "snapkv", "tova")  # streams under the others' caches: tests/kv/tiers/test_scored.py


@pytest.mark.usual("lagkv", "snapkv", "curdkv", "expected_attention", "qfilters", "kvzip")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "windowkv" else name for name in CASES]
)
def test_methods_for_prompts_as_published(prompt, name):
    """What every head of every layer keeps, and that keys and values are those of the prompt."""
    model, tokens, state, found = prompt
    cache, rule = CASES[name]
    new = sj.compact(model, state, cache, tokens[:, ASKED[name]] if name in ASKED else None)
    assert new.caches == (cache,) * 2
    for (q, k, v), layer in zip(found, new.layers, strict=True):
        slots = layer[-1].slots
        position, valid, kept_k, kept_v = map(np.asarray, (slots.position, slots.valid, slots.k, slots.v))
        for row in range(2):
            worth = rule(q[row], k[row], v[row], model.config.blocks[0].mixer.softmax_scale)
            for head in range(2):
                own = min(head, position.shape[1] - 1)
                kept = position[row, own][valid[row, own]]
                size = cache.tiers[-1].size
                assert len(kept) == size
                left = np.delete(worth[head], kept)  # the same token twice has keys of the same length
                assert worth[head][kept].min() > left.max() - 1e-5
                np.testing.assert_allclose(kept_k[row, head, :size], k[row, kept, head], atol=1e-4)
                np.testing.assert_allclose(kept_v[row, head, :size], v[row, kept, head], atol=1e-4)


@pytest.mark.parametrize("name", ["windowkv", pytest.param("snapkv", marks=pytest.mark.slow)])
def test_layers_of_a_group_keep_what_the_first_chooses(prompt, name):
    model, tokens, state, found = prompt
    cache = CASES[name][0]
    apart = sj.compact(model, state, cache, tokens[:, -QUERIES:])
    new = sj.compact(model, state, cache, tokens[:, -QUERIES:], group=2)
    first, second = (layer[-1].slots for layer in new.layers)
    valid = np.asarray(first.valid)
    np.testing.assert_array_equal(valid, second.valid)
    kept = np.asarray(second.position)
    np.testing.assert_array_equal(kept[valid], np.asarray(first.position)[valid])
    np.testing.assert_array_equal(kept, np.asarray(apart.layers[0][-1].slots.position))
    assert (kept != np.asarray(apart.layers[1][-1].slots.position)).any()  # by itself it would keep others
    for buffer, own in ((second.k, found[1][1]), (second.v, found[1][2])):
        for row, head in np.ndindex(2, 2):
            at = kept[row, min(head, kept.shape[1] - 1)][: cache.tiers[-1].size]
            np.testing.assert_allclose(np.asarray(buffer)[row, head, : len(at)], own[row, at, head], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_streams_go_on_behind_a_choice(prompt, name):
    model, tokens, state, _ = prompt
    new = sj.compact(model, state, CASES[name][0], tokens[:, ASKED[name]] if name in ASKED else None)
    _, logits = read_stream(model, new, random_tokens(2, 20, seed=1), [1])
    assert np.isfinite(logits).all()


DRAWN = np.random.default_rng(8)
KERNEL, BIAS = DRAWN.standard_normal((4, 12, 3)), DRAWN.standard_normal(4)
MERGES = {
    "kvmerger": (sj.kv.Gaussian(threshold=-0.1), merging.gaussian(-0.1)),
    "elastic_cache": (sj.kv.Anchors(), merging.anchors),
    "ems": (sj.kv.ZeroClass(threshold=0.2), merging.zero_class(0.2)),
    "d2o": (sj.kv.NearestAbove(), merging.nearest_above(0.7)),
    "lococo": (
        sj.kv.Convolved(kernels=sj.kv.Kernels.from_arrays(KERNEL, BIAS, 0.4, "")),
        merging.convolved(KERNEL, BIAS, 0.4),
    ),
}


@pytest.mark.usual("d2o", "kvmerger")
@pytest.mark.parametrize("name", MERGES)
def test_what_does_not_stay_is_merged(prompt, name):
    """One choice of a whole prompt: keys and values of every head, against the rule on plain lists."""
    model, tokens, state, found = prompt
    merge, join = MERGES[name]
    cache = sj.kv.Cascade(sj.kv.Window(QUERIES), sj.kv.Scored(SIZE, sj.kv.SnapKV(QUERIES, 3), every=8, merge=merge))
    new = sj.compact(model, state, cache, tokens[:, -QUERIES:])
    for (q, k, v), layer in zip(found, new.layers, strict=True):
        slots = layer[-1].slots
        for row in range(2):
            worth = snapkv(q[row], k[row], v[row], model.config.blocks[0].mixer.softmax_scale)
            for head in range(2):
                kept = np.asarray(slots.position)[row, head, :SIZE].tolist()
                rest = [i for i in range(LENGTH - QUERIES) if i not in kept]
                stays, leaves = ([[k[row, i, head], v[row, i, head], i] for i in some] for some in (kept, rest))
                lists = merging.Stream(scored.Rule(2, 0, 0, SIZE, 8, scored.mass, 1.0), join)
                join(lists, head, stays, leaves, dict(enumerate(worth[head])))
                for mine, theirs in ((slots.k, 0), (slots.v, 1)):
                    expected = np.array([entry[theirs] for entry in stays])
                    np.testing.assert_allclose(np.asarray(mine)[row, head, :SIZE], expected, atol=1e-4)
                assert max(np.abs(e[0] - k[row, e[2], head]).max() for e in stays) > 1e-2


KEPT = {
    "fused": sj.kv.preset("streaming_llm", sinks=2, window=7),
    "plain": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(7), fuse=False),
    "scored": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(5), sj.kv.Scored(8, sj.kv.KNorm(), every=6)),
    "scored and the rest": sj.kv.Cascade(sj.kv.Window(5), sj.kv.Scored(8, sj.kv.KNorm(), every=6), sj.kv.Full(64)),
}
BEFORE = {
    "dense": DENSE,
    "long window": sj.kv.preset("streaming_llm", sinks=2, window=LENGTH),
    "more": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(9), sj.kv.Scored(20, sj.kv.KNorm(), every=6)),
}


@pytest.mark.usual("dense-fused", "more-scored")
@pytest.mark.parametrize(
    ("before", "name"),
    [(old, new) for old in BEFORE for new in KEPT if (old, new) != ("more", "scored and the rest")],  # which has gone
)
def test_a_layer_goes_on_as_if_it_had_kept_that_all_along(before, name):
    """With one layer keys depend on their tokens alone, and a choice by norms does not on what was chosen before."""
    model, tokens, cache = build(ONE_LAYER), random_tokens(2, LENGTH + 12), KEPT[name]
    _, expected = read_stream(model, sj.init_state(model, cache, batch_size=2), tokens, [1])
    state = sj.read(model, sj.init_state(model, BEFORE[before], batch_size=2), tokens[:, :LENGTH], 16)
    state = sj.compact(model, state, cache)
    like = sj.init_state(model, cache, batch_size=2)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, like)
    _, logits = read_stream(model, state, tokens[:, LENGTH:], [1])
    np.testing.assert_allclose(logits, expected[:, LENGTH:], atol=1e-4)


def test_a_question_that_was_not_read_decides(prompt):
    """Its tokens attend to the prompt and to themselves, and are not kept."""
    model, tokens, state, _ = prompt
    question, cache = random_tokens(2, 4, seed=3), CASES["tova"][0]
    new = sj.compact(model, state, cache, question, stored=False)
    longer = sj.read(model, sj.init_state(model, DENSE, batch_size=2), np.concatenate((tokens, question), 1), 16)
    asked = sj.compact(model, longer, sj.kv.Cascade(sj.kv.Window(4), *cache.tiers), question)
    for mine, theirs in zip(new.layers, asked.layers, strict=True):
        np.testing.assert_array_equal(mine[-1].slots.position, theirs[-1].slots.position)
    np.testing.assert_array_equal(new.position, state.position)


def test_notes_of_a_cache_need_no_query():
    """H2O over H2O goes on from what was noted; layers with windows of their own keep them."""
    model, tokens = build(LOCAL), random_tokens(1, 40)
    wide, narrow = (sj.kv.preset("h2o", window=4, size=size, every=4) for size in (16, 6))
    state = sj.read(model, sj.init_state(model, wide), tokens, 8)
    new = sj.compact(model, state, narrow)
    assert new.caches == (sj.kv.Cascade(sj.kv.Window(4)), narrow)
    np.testing.assert_array_equal(new.layers[0][0].k, state.layers[0][0].k)
    before, after = state.layers[1][1].slots, new.layers[1][1].slots
    for head in range(2):
        note = np.where(before.valid[0, head], before.note[0, head], -1)
        best = np.argsort(-note, kind="stable")[:6]
        mine = after.position[0, head][after.valid[0, head]]
        assert sorted(mine.tolist()) == sorted(np.asarray(before.position)[0, head][best].tolist())


@pytest.mark.quick
def test_what_cannot_be_compacted_is_refused(prompt):
    model, tokens, state, _ = prompt
    snap = CASES["snapkv"][0]
    for cache, query, message in (
        (snap, None, "chooses by queries: give query="),
        (snap, tokens[:1, -4:], "query has 1 rows for 2 streams"),
        (snap, tokens[:, :0], "query needs rows of one length, of at least one token"),
        (snap, np.zeros((2, LENGTH + 1), int), f"query has {LENGTH + 1} tokens, and a stream has read {LENGTH}"),
        (sj.kv.preset("dense", capacity=LENGTH - 1), None, f"read {LENGTH} tokens, and the new cache ends after"),
        (
            sj.kv.CurrentChunk(8),
            None,
            "only cascades of tiers and groups of heads with them are compacted",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            sj.compact(model, state, cache, query)
        assert "\n" not in str(error.value)
    for caches, group, message in ((snap, 0, "group is 0: so many"), ((snap, DENSE), 2, "no two layers choose among")):
        with pytest.raises(ValueError, match=message):
            sj.compact(model, state, caches, tokens[:, -QUERIES:], group=group)
    kept = sj.compact(model, state, CASES["knorm"][0])
    with pytest.raises(ValueError, match="the heads hold different tokens beyond Window\\(0\\): Window\\(4\\) cannot"):
        sj.compact(model, kept, sj.kv.preset("window", window=4))


@pytest.mark.slow
def test_a_session_goes_on_under_another_cache(tmp_path):
    """A question decides what stays, is not read by that, and what is saved then goes on in a session of that cache."""
    model, kept = build(BYTES), sj.kv.preset("tova", size=12, every=4)
    session = start(model, sj.kv.preset("dense", capacity=256))
    session.read(PROMPT)
    with pytest.raises(ValueError, match="chooses by queries: give query="):
        session.compact(kept)
    seen, size = session.tokens_seen, session.cache_bytes
    session.compact(kept, "who was there?")
    assert session.tokens_seen == seen
    assert session.cache_bytes < size
    session.save(tmp_path / "session")
    other = start(model, kept)
    other.load(tmp_path / "session")
    assert session.cache == other.cache == kept
    jax.tree.map(np.testing.assert_array_equal, other.state, session.state)
    list(session.generate("So ", max_new_tokens=9))
    assert session.tokens_seen == seen + 3 + 9
