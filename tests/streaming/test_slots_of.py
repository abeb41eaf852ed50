"""Layers that read another layer's keys and values (Gemma 4 E2B and E4B): one store for all, wherever a stream goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    LayerInputConfig,
    NormConfig,
    parse_config,
)
from streamjax.streaming.saving.saved_streams import load_stream, save_stream
from streamjax.streaming.speculative.two_phases import look_ahead, take_in_first
from tests.architectures import tiny_config
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream

LENGTH = 24
CONFIG = tiny_config("gemma4-shared")  # layers 2 and 3 read what 0, which has a window of 6, and 1 keep


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(2, LENGTH) % CONFIG.vocab_size


def test_slots_are_held_and_counted_once(model):
    preset = sj.kv.preset("streaming_llm", sinks=2, window=6)
    state = sj.init_state(model, preset, batch_size=2)
    assert state.caches == (sj.kv.Cascade(sj.kv.Window(5)), preset, SlotsOf(0), SlotsOf(1))
    assert state.layers[2:] == ((), ())
    apart = dataclasses.replace(CONFIG.blocks[0].mixer, hands_on_keys=False)
    alone = CONFIG.replace(blocks=(dataclasses.replace(CONFIG.blocks[0], mixer=apart), CONFIG.blocks[1]))
    assert sj.kv.describe(preset, model).total == sj.kv.describe(preset, build(alone)).total
    assert "SlotsOf(layer=1)" in str(sj.kv.describe(preset, model))


def test_long_stretches_are_the_published_rule(model, tokens):
    """A chunk's readers see what was there in front of it, and its own keys: so cuts change nothing."""
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=6), batch_size=2)
    _, nats = sj.score(model, state, tokens[:, :21], chunk_size=7)
    logits = np.stack([oracle.run(model, row, oracle.Rule(2, 6)) for row in tokens[:, :21]])
    top = logits.max(axis=-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(logp[:, :-1], tokens[:, 1:21, None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats[:, 1:], expected, atol=1e-4)


def test_saved_streams_go_on(model, tokens, tmp_path):
    cache = sj.kv.preset("streaming_llm", sinks=2, window=6)
    state, _ = sj.score(model, sj.init_state(model, cache, batch_size=2), tokens[:, :14], chunk_size=7)
    save_stream(state, tmp_path / "stream")
    back = load_stream(tmp_path / "stream", sj.init_state(model, cache, batch_size=2))
    _, expected = sj.score(model, state, tokens[:, 14:21], chunk_size=7)
    np.testing.assert_array_equal(sj.score(model, back, tokens[:, 14:21], chunk_size=7)[1], expected)


@pytest.mark.slow
def test_guesses_leave_no_trace(model, tokens):
    """Of seven tokens that are looked at two count; rows that have none keep their state bit for bit."""
    cache = sj.kv.preset("streaming_llm", sinks=2, window=6)
    state, _ = sj.score(model, sj.init_state(model, cache, batch_size=2), tokens[:, :14], chunk_size=7)
    count = jnp.array([2, 0], jnp.int32)

    @jax.jit
    def guessed(state, chunk):
        hidden, waiting = look_ahead(model, state, chunk, jnp.full(2, 7, jnp.int32))
        return take_in_first(model, state, waiting, hidden, chunk, count)

    found = guessed(state, tokens[:, 14:21])
    for new, old in zip(jax.tree.leaves(found.layers), jax.tree.leaves(state.layers), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
    expected, _ = sj.step(model, state, tokens[:, 14:21], count)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.layers, expected.layers)


@pytest.mark.slow
def test_a_decode_step_copies_no_slots(model):
    """Readers' reads come before the lender's write, so that a donated buffer is written where it lies."""
    state = sj.init_state(model, sj.kv.preset("dense", capacity=4096))
    program = sj.step.lower(model, state, jnp.zeros((1, 1), jnp.int32)).compile()
    keys = max(leaf.nbytes for leaf in jax.tree.leaves(state.layers))
    assert program.memory_analysis().temp_size_in_bytes < 0.75 * keys


def test_what_cannot_read_for_several_layers_refuses(model):
    state = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), batch_size=2)
    with pytest.raises(ValueError, match=r"only cascades of tiers .* are compacted, not SlotsOf\(layer=0\)"):
        sj.compact(model, state, sj.kv.preset("window", window=4))
    with pytest.raises(ValueError, match="layer 3 reads what layer 1 keeps: a cache that chooses tokens as they come"):
        sj.init_state(model, sj.kv.preset("h2o"))


def test_configs():
    shapes = jax.eval_shape(lambda: sj.Decoder(CONFIG, jax.random.key(0)))
    assert CONFIG.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert parse_config(CONFIG.to_json_dict()) == CONFIG
    # 16 channels, 3 for each of 4 layers, keys and values of 2 heads of 6, and of 2 of 8
    assert CONFIG.stream_width == 16 + 4 * 3 + 2 * 2 * 6 + 2 * 2 * 8
    assert [CONFIG.handed_at(i) for i in range(4)] == [28, 52, 28, 52]


READER = CONFIG.blocks[2]
WRONG = [
    (lambda: CONFIG.replace(blocks=CONFIG.blocks[1:]), "layer 1 has head_dim 6, and layer 0, whose keys it reads, 8"),
    (lambda: CONFIG.replace(blocks=CONFIG.blocks[2:]), "layer 0 reads the keys of layer 0, which is no layer below it"),
    (
        lambda: CONFIG.replace(blocks=(*CONFIG.blocks[:2], READER.with_mixer(window=7))),
        "layer 2 has window 7, and layer 0, whose keys it reads, 6",
    ),
    (
        lambda: CONFIG.replace(blocks=(*CONFIG.blocks[:3], dataclasses.replace(CONFIG.blocks[3], layer_input=None))),
        "layer 3 has another layer_input than layer 0",
    ),
    (lambda: AttentionConfig(2, 2, 8, keys_of=0, hands_on_keys=True), "AttentionConfig.keys_of: the layer has no keys"),
    (
        lambda: AttentionConfig(2, 2, 8, keys_of=0, qk_norm=NormConfig(), qk_norm_over="projection"),
        "AttentionConfig.keys_of needs qk_norm_over='head'",
    ),
    (lambda: LayerInputConfig(0), "LayerInputConfig.channels is 0"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_plain_model_may_share_too():
    """One layer's keys for the other, in place of half of a small model's cache: whole and in pieces."""
    mixer = AttentionConfig(2, 1, 6, hands_on_keys=True)
    reader = dataclasses.replace(mixer, hands_on_keys=False, keys_of=0)
    blocks = tuple(BlockConfig(part, DenseConfig(20)) for part in (mixer, reader))
    own = build(CONFIG.replace(blocks=blocks, d_model=12, tie_embeddings=True, logit_softcap=None))
    tokens = random_tokens(1, 10) % CONFIG.vocab_size
    state = sj.init_state(own, sj.kv.preset("dense", capacity=10))
    np.testing.assert_allclose(read_stream(own, state, tokens, [4])[1], sj.forward(own, tokens), atol=1e-5)
