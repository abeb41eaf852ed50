"""The state of a stream: layouts of the model, storage dtype, and what cannot be a state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.state import _init
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens, read_stream

FUSED = sj.kv.preset("streaming_llm", sinks=2, window=6)
CACHES = (FUSED, sj.kv.Cascade(sj.kv.Window(2), sj.kv.Full(22)))


def test_both_layouts_of_the_model_give_the_same_stream():
    """Two periods of layers stacked and a remainder that is not, and one module a layer."""
    stacked = build(LOCAL.replace(num_layers=3, windows=(5, None, 5)), scan_layers=True)
    assert stacked.stacked_layers == 2
    flat = sj.models.unstack_layers(stacked)
    assert flat.stacked_layers == 0
    tokens = random_tokens(1, 24)
    runs = [read_stream(model, sj.init_state(model, FUSED), tokens, [8])[1] for model in (stacked, flat)]
    np.testing.assert_allclose(*runs, atol=1e-5, rtol=0)
    back = sj.models.stack_layers(flat)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cache_of_a_narrower_dtype():
    """Keys and values in bfloat16 under a float32 model, in every tier: half the bytes, nearly the same logits."""
    whole, model, tokens = build(GQA), build(GQA.replace(num_layers=1)), random_tokens(1, 24)
    wide, narrow = (sj.init_state(whole, CACHES, dtype=dtype) for dtype in (None, jnp.bfloat16))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(narrow.layers) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    assert narrow.cache_bytes < 0.65 * wide.cache_bytes
    wide, narrow = (sj.init_state(model, CACHES[1:], dtype=dtype) for dtype in (None, jnp.bfloat16))
    _, expected = read_stream(model, wide, tokens, [8])
    _, logits = read_stream(model, narrow, tokens, [8])
    error = np.abs(logits - expected)
    assert 1e-4 < error.max() < 1.0
    assert error.mean() < 0.05


def test_what_is_loaded_runs_the_programs_of_what_was_made(tmp_path):
    """A model and a state in files: neither is bound to a device, which would be another program to compile."""
    model, tokens = build(GQA), random_tokens(1, 8)
    sj.save_safetensors(model, tmp_path / "model")
    state, _ = sj.step(model, sj.init_state(model, FUSED), tokens)
    sj.save_stream(state, tmp_path / "stream")
    programs = sj.step._cache_size()
    loaded = sj.load(tmp_path / "model", dtype=jnp.float32)
    again = sj.load_stream(tmp_path / "stream", sj.init_state(loaded, FUSED))
    assert not any(leaf.committed for leaf in jax.tree.leaves((loaded, again)))
    (_, mine), (_, theirs) = (sj.step(*pair, tokens) for pair in ((loaded, again), (model, state)))
    np.testing.assert_array_equal(mine, theirs)
    assert sj.step._cache_size() == programs


@pytest.mark.quick
def test_one_cache_serves_global_layers_and_a_sequence_every_layer():
    model = build(LOCAL)
    caches = sj.init_state(model, FUSED).caches
    assert caches == (sj.kv.Cascade(sj.kv.Window(4)), FUSED)
    assert sj.init_state(model, [FUSED, FUSED]).caches == (FUSED, FUSED)
    assert sj.init_state(model, [FUSED, sj.kv.preset("dense", capacity=7)]).capacity == 7
    assert sj.init_state(model, FUSED).capacity is None


@pytest.mark.quick
def test_cache_bytes_is_what_the_arrays_take():
    model = build(GQA)
    state = sj.init_state(model, sj.kv.preset("window", window=6), batch_size=3)
    kv = 2 * 3 * 2 * 6 * 6 * 4  # keys and values; rows, heads, slots, channels, bytes
    layer = kv + 3 * 6 * 4 + 2 * 3 * 4  # positions, and two counters
    assert state.cache_bytes == 2 * layer + 3 * (4 + 4) + 3 * 16 * 4


@pytest.mark.quick
def test_streams_may_begin_anywhere_with_one_program():
    """The position is data: another one compiles nothing."""
    model = build(GQA)
    sj.init_state(model, FUSED, batch_size=2)
    programs = _init._cache_size()
    for position, expected in ((7, 7), (2**31 + 5, 2**31 + 5), (2**32 + 3, 3), (-1, 2**32 - 1)):
        begun = sj.init_state(model, FUSED, batch_size=2, position=position)
        assert begun.position.dtype == jnp.uint32
        assert begun.position.tolist() == [expected] * 2
    assert _init._cache_size() == programs


@pytest.mark.quick
@pytest.mark.parametrize(
    ("cache", "options", "message"),
    [
        (FUSED, {"batch_size": 0}, "batch_size must be at least 1"),
        ([FUSED], {}, "1 caches for 2 layers"),
        ([FUSED] * 3, {}, "3 caches for 2 layers"),
        (sj.kv.Window(4), {}, "a cache is a Cascade"),
        ("streaming_llm", {}, "a cache is a Cascade"),
        ([FUSED, sj.kv.Window(4)], {}, "a cache is a Cascade"),
    ],
)
def test_wrong_caches(untyped, cache, options, message):
    with pytest.raises(ValueError, match=message) as error:
        sj.init_state(build(GQA), cache, **options)
    assert "\n" not in str(error.value)


@pytest.mark.quick
def test_a_window_of_one_token_has_no_cache():
    model = build(LOCAL.replace(windows=(None, 1)))
    with pytest.raises(ValueError, match="layer 1 has a sliding window of 1"):
        sj.init_state(model, FUSED)


@pytest.mark.quick
def test_a_step_wants_a_row_for_each_stream():
    model = build(GQA)
    for streams, rows in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"{rows} rows of tokens for {streams} streams"):
            sj.step(model, sj.init_state(model, FUSED, batch_size=streams), jnp.zeros((rows, 3), jnp.int32))
