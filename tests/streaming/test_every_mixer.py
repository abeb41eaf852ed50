"""Every recurrent mixer in one model: cut anyhow, in rows of their own lengths, saved, and for a million tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import ModelConfig
from streamjax.models.config import (
    BlockConfig,
    ChannelMixConfig,
    ConvEmbeddingConfig,
    GatedConvConfig,
    GatedDeltaConfig,
    GatedLinearConfig,
    GMUConfig,
    HGRN2Config,
    HGRNConfig,
    KimiDeltaConfig,
    LMUConfig,
    MoMConfig,
    PrefixLinearConfig,
    RGLRUConfig,
    RWKV7Config,
    SpikingMixConfig,
    SSDConfig,
)
from streamjax.models.mixers import build
from streamjax.streaming.saving.saved_streams import load_stream, save_stream
from tests.models.random_decoders import random_decoder
from tests.streaming.tiny_models import random_tokens

VOCAB, LENGTH = 40, 513
MIXERS = (
    ConvEmbeddingConfig(2, 2, 8),
    GatedDeltaConfig(4, 2, key_dim=6, value_dim=5),
    KimiDeltaConfig(2, 2, key_dim=4, value_dim=5, rank=3),
    SSDConfig(4, 2, head_dim=6, state_dim=5, hands_on=True),
    GMUConfig(2, 2, channels=12),
    GatedLinearConfig(2, 2, key_dim=4, value_dim=5, rank=3),
    HGRN2Config(2, 2, key_dim=4, value_dim=5, lower_bound=0.4),
    HGRNConfig(2, 2, channels=5, lower_bound=0.6),
    RGLRUConfig(2, 2, channels=6),
    RWKV7Config(2, 2, head_dim=8, rank=3),
    ChannelMixConfig(2, 2, width=8, channels=12),
    GatedConvConfig(2, 2, channels=6),
    MoMConfig(2, 2, key_dim=4, value_dim=5, memories=3),
    PrefixLinearConfig(2, 2, key_dim=4, value_dim=5),
    LMUConfig(2, 2, channels=3, order=4, theta=40.0),
    LMUConfig(2, 2, channels=8, order=4, theta=40.0, unit="spiking"),
    SpikingMixConfig(2, 2, width=8, channels=10),
)
CONFIG = ModelConfig(VOCAB, 16, tuple(BlockConfig(mixer, None) for mixer in MIXERS))
CACHE = sj.kv.preset("streaming_llm", sinks=2, window=8)


@pytest.fixture(scope="module")
def model():
    """Weights small enough that states say something for hundreds of tokens."""
    return jax.tree.map(lambda x: 0.5 * x, random_decoder(CONFIG))


def test_no_mixer_is_missing():
    recurrent = {config for config in build._MODULES if getattr(config, "recurrent", False)}
    assert {type(mixer) for mixer in MIXERS} == recurrent


@pytest.mark.slow
def test_any_cut_gives_the_same(model):
    """The nats of each token are those of the whole sequence at once."""
    tokens = random_tokens(2, LENGTH) % VOCAB
    logits = jax.nn.log_softmax(sj.forward(model, tokens[:, :-1]))
    expected = -np.take_along_axis(np.asarray(logits), tokens[:, 1:, None], 2)[..., 0]
    for size in (512, 64, 7, 1):
        _, nats = sj.score(model, sj.init_state(model, CACHE, 2), tokens, size)
        np.testing.assert_allclose(nats[:, 1:], expected, atol=1e-4, rtol=0, err_msg=f"chunks of {size}")


@pytest.mark.slow
def test_rows_of_different_lengths_and_a_saved_stream(model, tmp_path):
    """A row without new tokens keeps its state bit for bit; another has its own stream's; a saved one goes on."""
    tokens = random_tokens(3, 14) % VOCAB
    state, _ = sj.step(model, sj.init_state(model, CACHE, 3), tokens[:, :7])
    save_stream(state, tmp_path / "stream")
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.layers)]
    count = jnp.asarray([7, 0, 3], jnp.int32)
    state, logits = sj.step(model, state, tokens[:, 7:], count)
    alone = sj.read(model, sj.init_state(model, CACHE, 1), tokens[2:, :10], 10)
    for old, new, own in zip(before, jax.tree.leaves(state.layers), jax.tree.leaves(alone.layers), strict=True):
        assert old[1].tobytes() == np.asarray(new)[1].tobytes()
        np.testing.assert_allclose(np.asarray(new)[2], np.asarray(own)[0], atol=1e-4)
    loaded = load_stream(tmp_path / "stream", sj.init_state(model, CACHE, 3))
    _, again = sj.step(model, loaded, tokens[:, 7:], count)
    np.testing.assert_array_equal(again, logits)


@pytest.mark.slow
def test_a_million_tokens_stay_finite_and_flat(model):
    state, nats = sj.init_state(model, CACHE), []
    size = state.cache_bytes
    for part in range(16):
        state, found = sj.score(model, state, random_tokens(1, 2**16, seed=part) % VOCAB)
        nats.append(float(np.mean(found)))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.layers))
    assert (int(state.position[0]), state.cache_bytes) == (2**20, size)
    np.testing.assert_allclose(nats, nats[0], rtol=0.02)
