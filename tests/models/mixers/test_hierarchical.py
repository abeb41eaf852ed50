"""Models with hierarchical sparse attention: streaming equals the parallel form, and the memory is what it says."""

import dataclasses
import json
import re
from functools import cache as cached

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.models import Decoder, HSAConfig, ModelConfig, UniformConfig
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, RopeConfig, SSDConfig, parse_config
from streamjax.streaming import scan
from tests.covering import rest_slow
from tests.streaming import tiny_models

BASE = UniformConfig(
    vocab_size=31,
    d_model=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    tie_embeddings=True,
    windows=(5, 5, 5, 5),
)
SHARED = BASE.replace(hsa=HSAConfig(layers=(2, 3), memory_layers=(2,), chunk_size=4, top_k=3))
OWN = BASE.replace(hsa=HSAConfig(layers=(1, 3), memory_layers=(1, 3), chunk_size=3, top_k=2, encoder_layers=2))
MIXED = BASE.replace(
    num_layers=3,
    windows=(5, None, 5),
    parallel_residual=True,
    hsa=HSAConfig(layers=(1, 2), memory_layers=(0, 2), chunk_size=4, top_k=9),
)
HEADS, MLP = AttentionConfig(4, 2, 4, rope=RopeConfig(theta=100.0)), DenseConfig(24)
RAMBA = ModelConfig(  # Mamba-2 in every layer
    31,
    16,
    (BlockConfig(SSDConfig(4, 2, head_dim=4, state_dim=4), None),) * 3,
    hsa=HSAConfig((1, 2), (1,), chunk_size=4, top_k=2, attention=HEADS, mlp=MLP),
)
CONFIGS = {"shared": SHARED, "own": OWN, "mixed": MIXED, "ramba": RAMBA}


@cached
def build(config):
    """Drawn without compiling anything; matrices so large that logits are about 1.6."""
    return jax.tree.map(lambda x: jnp.asarray(0.7 * np.asarray(x)) if x.ndim > 1 else x, tiny_models.build(config))


def model_of(name):
    return build(CONFIGS[name])


def tokens_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, 31, (rows, length)).astype(np.int32)


@pytest.mark.usual("mixed")
@pytest.mark.parametrize("name", rest_slow(CONFIGS, "mixed", "ramba"))
@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.sampled_from([1, 9]), min_size=3, max_size=12))
def test_streaming_is_the_parallel_form(name, cuts):
    """However the stream is cut: pages that fill within a chunk of the stream, over its edge, several at once."""
    model, tokens = model_of(name), tokens_of(2, 48)
    cache = sj.kv.preset("dense" if name == "mixed" else "hsa", capacity=48)
    state, found, start = sj.init_state(model, cache, 2), [], 0
    for width in cuts:
        if start + width <= 48:
            state, logits = sj.step(model, state, tokens[:, start : start + width])
            found.append(logits)
            start += width
    np.testing.assert_allclose(np.concatenate(found, 1), sj.forward(model, tokens)[:, :start], atol=2e-5)


@pytest.mark.slow
def test_the_memory_matters_and_reaches_back():
    """A token far outside of the windows changes the logits; without the memory it does not."""
    model, tokens = model_of("shared"), tokens_of(1, 64)
    other = tokens.copy()
    other[0, 2] = (other[0, 2] + 1) % 31
    far = [np.asarray(sj.forward(model, t))[0, -1] for t in (tokens, other)]
    assert np.abs(far[0] - far[1]).max() > 1e-4
    short = sj.kv.preset("hsa", capacity=8)
    near = [sj.read(model, sj.init_state(model, short), t, 8).hidden for t in (tokens, other)]
    np.testing.assert_array_equal(*near)


def test_only_whole_chunks_before_a_token_are_seen():
    """A change reaches a token beyond the windows when its chunk is complete, not before."""
    model = build(BASE.replace(windows=(2, 2, 2, 2), hsa=HSAConfig((2,), (2,), chunk_size=8, top_k=2)))
    tokens = tokens_of(1, 20)
    other = tokens.copy()
    other[0, 8] = (other[0, 8] + 1) % 31  # the first token of the second chunk; four windows of 2 reach to 12
    change = np.abs(np.asarray(sj.forward(model, tokens)) - np.asarray(sj.forward(model, other)))[0].max(axis=-1)
    assert (change[:8] == 0).all()
    assert change[8] > 0
    assert (change[13:16] == 0).all()
    assert (change[16:] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("lengths", rest_slow([(61, 61), (64, 23), (5, 64)], (64, 23)))
def test_a_long_stretch_passes_over_the_upper_layers(monkeypatch, lengths):
    """And ends in the same state, as far as anything may still see of it: what follows is the same."""
    model, tokens = model_of("shared"), tokens_of(2, 70)

    def read_on():
        state = sj.read(model, sj.init_state(model, sj.kv.preset("hsa", capacity=40), 2), tokens[:, :3], 4)
        state = sj.read(model, state, tokens[:, 3:67], 4, lengths=np.array(lengths))
        hidden = np.asarray(state.hidden)
        return hidden, sj.step(model, state, tokens[:, 67:])[1]

    skipped = []
    monkeypatch.setattr(scan, "_read_chunks", lambda *a, f=scan._read_chunks, **k: (skipped.append(k), f(*a, **k))[1])
    short = read_on()
    assert sum(k.get("memorise") == 2 for k in skipped) == max(min(lengths) - 9, 0) // 4
    monkeypatch.setattr(scan, "passed_over", lambda *_: None)
    for a, b in zip(short, read_on(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_rows_of_a_batch_are_streams_of_their_own():
    """Each row stops where it likes; padding fills no page."""
    model, tokens = model_of("shared"), tokens_of(3, 40)
    counts = np.array([[7, 8, 1], [2, 0, 8], [8, 8, 8], [3, 5, 8]], np.int32)
    state, starts, together = sj.init_state(model, sj.kv.preset("hsa", capacity=64), 3), np.zeros(3, int), [[], [], []]
    for count in counts:
        chunk = np.full((3, 8), 30, np.int32)
        for row in range(3):
            chunk[row, : count[row]] = tokens[row, starts[row] : starts[row] + count[row]]
        state, logits = sj.step(model, state, chunk, count)
        for row in range(3):
            together[row].append(np.asarray(logits)[row, : count[row]])
        starts += count
    whole = np.asarray(sj.forward(model, tokens))
    for row in range(3):
        np.testing.assert_allclose(np.concatenate(together[row]), whole[row, : starts[row]], atol=2e-5)


def test_the_oldest_chunks_make_room():
    """A full memory is that of a stream which began where its oldest chunk does, as far as chunks of a stream go.

    The state keeps its size.
    """
    model = build(BASE.replace(num_layers=2, windows=(2, 2), hsa=HSAConfig((1,), (0,), chunk_size=4, top_k=3)))
    tokens = tokens_of(1, 121)
    cache = sj.kv.preset("hsa", capacity=12)

    def read(start):
        state = sj.init_state(model, cache, position=start)
        for at in range(start, 120, 8):
            state, _ = sj.step(model, state, tokens[:, at : at + 8])
        return state

    old, new = read(0), read(96)
    assert old.cache_bytes == sj.init_state(model, cache).cache_bytes
    for state, first in ((old, 27), (new, 3)):
        assert sorted(np.asarray(state.layers[0][1].number).ravel().tolist()) == [first, first + 1, first + 2]
    _, a = sj.step(model, old, tokens[:, -1:])
    _, b = sj.step(model, new, tokens[:, -1:])
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_packed_sequences_read_their_own_chunks():
    """A segment on whole chunks reads as it would alone; a chunk with two segments is seen by neither."""
    model, tokens = model_of("shared"), tokens_of(1, 24)
    segments = jnp.asarray(np.repeat([1, 2], [8, 16])[None])
    positions = jnp.asarray(np.concatenate((np.arange(8), np.arange(16)))[None])
    found = sj.forward(model, tokens, positions=positions, segment_ids=segments)
    first, second = (sj.forward(model, np.roll(tokens, -start, axis=1)) for start in (0, 8))  # what follows is not seen
    np.testing.assert_allclose(found, np.concatenate([first[:, :8], second[:, :16]], axis=1), atol=2e-5)
    mixed = jnp.asarray(np.repeat([1, 2], [6, 18])[None])
    other = tokens.copy()
    other[0, 2] = (other[0, 2] + 1) % 31
    after = [sj.forward(model, t, positions=positions, segment_ids=mixed)[0, 6:] for t in (tokens, other)]
    np.testing.assert_array_equal(*after)


def test_a_short_stream_reads_nothing():
    """Before the first chunk is complete the branch adds nothing, in both forms."""
    model, tokens = model_of("shared"), tokens_of(1, 3)
    without = jax.eval_shape(lambda: sj.Decoder(BASE, jax.random.key(0)))
    plain = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(model)}
    same = jax.tree_util.tree_map_with_path(lambda p, _: plain[jax.tree_util.keystr(p)], without)
    np.testing.assert_allclose(sj.forward(model, tokens), sj.forward(same, tokens), atol=1e-6)


def test_the_parameter_count_is_right():
    for config in CONFIGS.values():
        shapes = jax.eval_shape(lambda config=config: Decoder(config, jax.random.key(0)))
        assert config.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_configs_go_through_json():
    assert parse_config(json.loads(json.dumps(RAMBA.to_json_dict()))) == RAMBA
    for config in (SHARED, OWN, MIXED):
        config = config.replace(rope=RopeConfig(theta=5e3))
        flat = json.dumps(dataclasses.asdict(config))  # what older versions wrote
        for text in (json.dumps(config.expand().to_json_dict()), flat):
            assert parse_config(json.loads(text)) == config.expand()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HSAConfig((), (1,)), "HSAConfig.layers must name layers in order, got ()"),
        (lambda: HSAConfig((1,), (3, 2)), "HSAConfig.memory_layers must name layers in order, got (3, 2)"),
        (lambda: HSAConfig((1,), (2,)), "HSAConfig.layers begin at 1, below the first of memory_layers, 2"),
        (lambda: HSAConfig((1,), (1,), top_k=0), "HSAConfig.top_k is 0: it must be a whole number of at least 1"),
        (lambda: BASE.replace(hsa=HSAConfig((4,), (1,))), "ModelConfig.hsa names layer 4 of 4"),
        (
            lambda: sj.init_state(model_of("shared"), sj.kv.preset("hsa", capacity=8, top_k=3)),
            "the chunk memory's top_k is 3, but 8 tokens lie in 2 chunks of 4",
        ),
        (
            lambda: sj.init_state(model_of("mixed"), sj.kv.preset("hsa")),
            "layer 1 has full attention: give it a cache of its own, one a layer",
        ),
        (
            lambda: sj.init_state(build(BASE), sj.kv.preset("hsa")),
            "this cache is the memory of hierarchical sparse attention (hsa), which the model does not have",
        ),
        (lambda: sj.kv.preset("hsa", capacity=0), "ChunkMemory.capacity_tokens is 0: it must be a whole"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)
