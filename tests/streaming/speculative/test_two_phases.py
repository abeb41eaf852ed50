"""Guesses that were wrong leave no trace in any cache: bit for bit, or to the last bits where a chunk's tokens share
what they gather."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv import Cascade, Sink, Window
from streamjax.streaming.speculative.two_phases import harmless, look_ahead, take_in_first
from streamjax.streaming.step import advance
from tests.architectures import tiny_config
from tests.streaming.tiny_models import GQA, build, random_tokens

WIDTH, ROUNDS = 5, 14
FAR = 10**6
CACHES = {
    "sinks and window": sj.kv.preset("streaming_llm", sinks=2, window=7),
    "sinks, windows": Cascade(Sink(3), Window(4), Window(3), fuse=False),
    "dense": sj.kv.preset("dense", capacity=80),
    "coded": sj.kv.preset("kivi", bits=2, group=8, residual=8, capacity=80),
    "staircase": sj.kv.preset("staircase", sinks=2, window=4, eight=16, four=16, group=8),
    "pages": sj.kv.preset("quest", sinks=2, window=4, capacity=32, page=4, top_k=3),
    "noted pages": Cascade(Sink(1, reach=FAR), Window(6), sj.kv.Pages(3, 24, 2, sj.kv.Representative(1), distance=6)),
    "content": sj.kv.preset("sentence_kv", sinks=1, window=4, capacity=64, page=8, top_k=2, ends=(7, 9)),
    "clusters": sj.kv.preset(
        "retro_infer",
        sinks=1,
        window=4,
        capacity=48,
        segment=12,
        retrieve=2,
        estimate=3,
        size=4,
        most=5,
        iterations=2,
        block=1,
    ),
    "scored": sj.kv.preset("h2o", window=4, size=8, every=4),
    "scored by outputs": sj.kv.preset("criticalkv", window=4, size=8, kernel=3, every=4),
    "snapkv": sj.kv.preset("snapkv", window=4, size=8, kernel=3, every=8),
    "scored in lags": sj.kv.preset("lagkv", sinks=2, size=8, lag=6),
    "merged": sj.kv.preset("d2o", window=4, size=8, every=4),
    "merged by turns": sj.kv.preset("kvmerger", window=4, size=8, every=4),
    "coded losers": sj.kv.preset("mikv", window=4, size=4, bits=2, group=8, every=4, capacity=80),
    "budget of heads": Cascade(Sink(1, reach=FAR), Window(4), sj.kv.Pooled(8, sj.kv.KNorm(), every=4)),
    "groups of heads": sj.kv.HeadGroups(
        ((1,), sj.kv.preset("dense", capacity=80)), ((0,), sj.kv.preset("streaming_llm", sinks=2, window=5))
    ),
    "shared front": sj.kv.SharedFront(
        2,
        ((1,), Cascade(Sink(1, reach=FAR), Window(4), sj.kv.Pages(2, 80, 6))),
        ((0,), Cascade(Sink(1, reach=FAR), Window(4))),
    ),
    "compensated": sj.kv.HeadGroups(
        ((0,), sj.kv.preset("dense", capacity=80)), ((1,), Cascade(Sink(1, reach=FAR), Window(4), sj.kv.Compensation()))
    ),
}
MODELS = {name: tiny_config(name) for name in ("qwen3_next", "mamba2", "llama4", "deepseek_v3", "gemma3", "falcon_h1")}
MODELS["chunk memory"] = GQA.replace(
    num_layers=2, windows=(5,) * 2, hsa=sj.HSAConfig(layers=(1,), memory_layers=(0,), chunk_size=4, top_k=2)
)

RARE = ("mamba2", "gemma3", "deepseek_v3")  # for the slow suite: others have their kinds of state


@jax.jit
def at_once(model, state, tokens, count):
    return advance(model, state, tokens, count)


@jax.jit
def in_two(model, state, tokens, given, count):
    hidden, waiting = look_ahead(model, state, tokens, given)
    return take_in_first(model, state, waiting, hidden, tokens, count), hidden


def check(model, caches, seed=3):
    """Chunks with wrong guesses behind what counts, against chunks without: from the same states, all of them.

    By the same program bit for bit; `advance`, which is another one, may round in another order. Where a cache changes
    under a chunk, all rows are cut if that of one changes, and sums are of other orders; `advance` does not cut
    (`test_one_by_one.py` has plain steps).
    """
    draw, vocab = np.random.default_rng(seed), model.config.vocab_size
    state = sj.init_state(model, caches, batch_size=2, note_used=True)
    exact = all(cache.alters_every is None for cache in state.caches)
    for i in range(ROUNDS):
        tokens = random_tokens(2, WIDTH, seed=i) % vocab
        given = jnp.array([WIDTH, draw.integers(0, WIDTH + 1)], jnp.int32)
        given = np.asarray(harmless(model, state, given))
        count = np.minimum(draw.integers(0, WIDTH + 1, 2), given)
        wrong = jnp.asarray(np.where(np.arange(WIDTH) < count[:, None], tokens, (tokens + 5) % vocab))
        given, count, tokens = jnp.asarray(given), jnp.asarray(count, jnp.int32), jnp.asarray(tokens)
        expected, _ = in_two(model, state, tokens, count, count)
        near = at_once(model, state, tokens, count)[0] if exact else expected
        state, _ = in_two(model, state, wrong, given, count)
        leaves = (jax.tree_util.tree_leaves_with_path(x) for x in (state, expected, near))
        for (path, leaf), (_, same), (_, other) in zip(*leaves, strict=True):
            where = f"round {i}: {jax.tree_util.keystr(path)}"
            if exact or leaf.dtype != np.float32:
                np.testing.assert_array_equal(leaf, same, err_msg=where)
            if leaf.dtype == np.float32:
                np.testing.assert_allclose(leaf, same, atol=1e-5, rtol=1e-5, err_msg=where)
                np.testing.assert_allclose(leaf, other, atol=1e-4, rtol=1e-4, err_msg=where)
            elif leaf.dtype in (np.int32, np.uint32, bool):
                np.testing.assert_array_equal(leaf, other, err_msg=where)
    assert int(state.seen.max()) > 14


USUAL = ("pages", "chunk")
RARER = tuple(name for name in CACHES if name not in USUAL)


@pytest.mark.parametrize("names", [USUAL, *(pytest.param(RARER[i::3], marks=pytest.mark.slow) for i in range(3))])
def test_every_cache_is_as_if_nothing_wrong_had_been_read(names):
    """One cache a layer."""
    model = build(GQA.replace(num_layers=len(names), head_dim=8))
    caches = {**CACHES, "chunk": sj.kv.CurrentChunk(7)}
    check(model, [caches[name] for name in names])


@pytest.mark.usual("chunk memory", "qwen3_next")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in RARE else n for n in MODELS])
def test_every_kind_of_layer_is_as_if_nothing_wrong_had_been_read(name):
    """Recurrent states, chunks, latent keys, windows of the model's own, and a memory that an encoder makes."""
    cache = "hsa:capacity=8" if name == "chunk memory" else "streaming_llm:sinks=2,window=7"
    kind, options = sj.kv.parse_preset(cache)
    check(build(MODELS[name]), sj.kv.preset(kind, **options))
