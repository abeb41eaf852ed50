"""Streams of recurrent layers, and of one beside attention with a window: any cut, ragged rows, saved and compacted.

The rule itself is held against token-by-token float64 in tests/attention/test_recurrent.py, and whole layers in
tests/models/families/test_streams.py.
"""

import dataclasses

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv import Cascade, Window
from streamjax.kv.layer_caches.recurrence import BesideRecurrence, Recurrence
from streamjax.models import ModelConfig
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, GatedDeltaConfig, HSAConfig, SSDConfig
from streamjax.streaming.saving.saved_streams import load_stream, save_stream
from tests.models.random_decoders import random_decoder
from tests.streaming.tiny_models import random_tokens

VOCAB, LENGTH = 40, 513
MLP = DenseConfig(24)
DELTA = GatedDeltaConfig(num_heads=4, num_groups=2, key_dim=6, value_dim=5)
SPACE = SSDConfig(num_heads=4, num_groups=2, head_dim=6, state_dim=5)
LAYERS = (
    BlockConfig(DELTA, MLP),
    BlockConfig(SPACE, None),
    BlockConfig(AttentionConfig(4, 2, 6, window=9), MLP, beside=SPACE),
)
HYBRID = ModelConfig(VOCAB, 16, LAYERS)
CACHE = sj.kv.preset("streaming_llm", sinks=2, window=8)


def scaled(config):
    """A model whose weights are drawn, small enough that its states say something for hundreds of tokens."""
    return jax.tree.map(lambda x: 0.3 * x, random_decoder(config))


@pytest.fixture(scope="module")
def model():
    return scaled(HYBRID)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64,), pytest.param((1, 7, 512), marks=pytest.mark.slow)])
def test_any_cut_gives_the_same(model, sizes):
    """The nats of each token are those of the whole sequence at once."""
    tokens = random_tokens(2, LENGTH) % VOCAB
    logits = jax.nn.log_softmax(sj.forward(model, tokens[:, :-1]))
    expected = -np.take_along_axis(np.asarray(logits), tokens[:, 1:, None], 2)[..., 0]
    for size in sizes:
        state = sj.init_state(model, CACHE, 2)
        _, nats = sj.score(model, state, tokens, size)
        np.testing.assert_allclose(nats[:, 1:], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_million_tokens_stay_finite_and_flat(model):
    """The state is as large at the end as at the start, and what a token costs is no more than at first."""
    state, piece = sj.init_state(model, CACHE), 2**16
    size, nats = state.cache_bytes, []
    for part in range(16):
        state, found = sj.score(model, state, random_tokens(1, piece, seed=part) % VOCAB)
        nats.append(float(np.mean(found)))
        assert state.cache_bytes == size
        assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.layers))
    assert int(state.position[0]) == 2**20
    np.testing.assert_allclose(nats, nats[0], rtol=0.02)


@pytest.mark.slow
def test_rows_of_different_lengths(model):
    """A row without new tokens keeps its state bit for bit; the others have that of streams of their own."""
    tokens, count = random_tokens(3, 14) % VOCAB, np.array([7, 0, 3])
    state, _ = sj.step(model, sj.init_state(model, CACHE, 3), tokens[:, :7])
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.layers)]
    state, _ = sj.step(model, state, tokens[:, 7:], jax.numpy.asarray(count, jax.numpy.int32))
    for old, new in zip(before, jax.tree.leaves(state.layers), strict=True):
        assert old[1].tobytes() == np.asarray(new)[1].tobytes()
    alone = sj.read(model, sj.init_state(model, CACHE, 1), tokens[2:, :10], 10)
    for mine, other in zip(jax.tree.leaves(state.layers), jax.tree.leaves(alone.layers), strict=True):
        np.testing.assert_allclose(np.asarray(mine)[2], np.asarray(other)[0], atol=1e-5)


def test_the_layers_keep_their_state_under_every_cache(model):
    kinds, window = [Recurrence, Recurrence, BesideRecurrence], Cascade(Window(8))
    for cache in (CACHE, sj.kv.preset("dense", capacity=8), [CACHE] * 3, sj.init_state(model, CACHE).caches):
        state = sj.init_state(model, cache)
        assert [type(kept) for kept in state.caches] == kinds
        assert state.caches[2].attention == (CACHE if cache == [CACHE] * 3 else window)
    assert sj.init_state(model, CACHE).capacity is None
    words = str(sj.kv.describe(CACHE, model))
    assert "Recurrence(4x" in words
    assert "Window(8)" in words
    with pytest.raises(
        ValueError, match="only cascades of tiers and groups of heads with them are compacted"
    ) as caught:
        sj.compact(model, state, CACHE)
    assert "\n" not in str(caught.value)


def test_a_saved_stream_goes_on_bit_for_bit(model, tmp_path):
    tokens = random_tokens(1, 14) % VOCAB
    state, _ = sj.step(model, sj.init_state(model, CACHE), tokens[:, :7])
    save_stream(state, tmp_path / "stream")
    loaded = load_stream(tmp_path / "stream", sj.init_state(model, CACHE))
    for mine, other in zip(
        jax.tree.leaves(sj.step(model, state, tokens[:, 7:])),
        jax.tree.leaves(sj.step(model, loaded, tokens[:, 7:])),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.usual("None")
@pytest.mark.parametrize("count", [None, 1, pytest.param(5, marks=pytest.mark.slow)])
def test_compact_leaves_the_state_as_it_is(count):
    """With a question that comes next: attention above a recurrent layer sees what reading it would have made."""
    mixers = DELTA, AttentionConfig(4, 2, 6)
    model = scaled(ModelConfig(VOCAB, 16, tuple(BlockConfig(mixer, MLP) for mixer in mixers)))
    tokens = random_tokens(1, 24) % VOCAB
    dense = sj.kv.preset("dense", capacity=32)
    state = sj.read(model, sj.init_state(model, dense), tokens[:, :16], 16)
    before = jax.tree.map(np.asarray, state.layers[0])
    if count is None:
        new = sj.compact(model, state, CACHE)
        with pytest.raises(ValueError, match="recurrent layers cannot read tokens again"):
            sj.compact(model, state, CACHE, query=tokens[:, 12:16])
        kept = sj.read(model, sj.init_state(model, CACHE), tokens[:, :16], 16)
        (_, mine), (_, other) = (sj.step(model, one, tokens[:, 16:]) for one in (new, kept))
        np.testing.assert_allclose(mine, other, atol=1e-4)
        return
    cache = sj.kv.preset("snapkv", window=2, size=7)
    new = sj.compact(model, state, cache, query=tokens[:, 16 : 16 + count], stored=False)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, new.layers[0]))
    # Padding in front, which one token has and two have not, changes nothing of what the query sees.
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(new.layers[1]))


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match=r"GatedDeltaConfig\.num_heads 3 must be a multiple of num_groups 2"):
        dataclasses.replace(DELTA, num_heads=3)
    with pytest.raises(ValueError, match=r"ModelConfig\.hsa names layer 1, which has no attention: give HSA"):
        HYBRID.replace(hsa=HSAConfig(layers=(1,), memory_layers=(0,)))
    with pytest.raises(
        ValueError, match=r"ModelConfig\.hsa names layer 2, which has a recurrent mixer beside its attention"
    ):
        HYBRID.replace(hsa=HSAConfig(layers=(2,), memory_layers=(2,)))
    with pytest.raises(ValueError, match="residual='parallel' is for layers with an MLP"):
        BlockConfig(SPACE, None, residual="parallel")
    with pytest.raises(ValueError, match=r"BlockConfig\.beside is for layers that attend"):
        BlockConfig(SPACE, MLP, beside=SPACE)
    with pytest.raises(ValueError, match=r"SSDConfig\.scales has 2 factors: give five"):
        dataclasses.replace(SPACE, scales=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"DenseConfig\.gate_scale is 2\.0 without a gate"):
        DenseConfig(24, gated=False, gate_scale=2.0)
