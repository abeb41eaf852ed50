"""Linear attention with decays, HGRN and RWKV-7: token by token in float64, streamed, trained, and refused."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import ModelConfig
from streamjax.models.config import (
    BlockConfig,
    ChannelMixConfig,
    GatedLinearConfig,
    HGRN2Config,
    HGRNConfig,
    RWKV7Config,
    parse_config,
)
from streamjax.models.mixers.hgrn import rising_bounds
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream
from tests.training.gradient_checks import check

VOCAB, LENGTH = 31, 24
LAYERS = (
    HGRNConfig(2, 2, channels=5, lower_bound=rising_bounds(3)[0]),
    HGRN2Config(2, 2, key_dim=4, value_dim=5, lower_bound=rising_bounds(3)[1]),
    GatedLinearConfig(2, 2, key_dim=4, value_dim=5, rank=3, decay_power=2.0),
    RWKV7Config(2, 2, head_dim=8, rank=3, rate_rank=2, gate_rank=5, norm_eps=1e-3),
    ChannelMixConfig(2, 2, width=8, channels=12),
    HGRNConfig(2, 2, channels=5, lower_bound=rising_bounds(3)[2]),
)
CONFIG = ModelConfig(VOCAB, 16, tuple(BlockConfig(mixer, None) for mixer in LAYERS))


def test_whole_and_in_pieces_it_is_the_published_recurrence():
    """A stream keeps states alone: under a preset that evicts it is the whole sequence."""
    model, tokens = build(CONFIG), random_tokens(2, LENGTH) % VOCAB
    expected = oracle.run(model, tokens[0], oracle.DENSE)
    whole = sj.forward(model, tokens)
    np.testing.assert_allclose(whole[0], expected, atol=1e-4)
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=6), batch_size=2)
    _, logits = read_stream(model, state, tokens, [5, 1])
    np.testing.assert_allclose(logits, whole, atol=1e-4)
    assert state.capacity is None


@pytest.mark.parametrize("order", ["chunk", pytest.param("layer", marks=pytest.mark.slow)])
def test_gives_the_gradient(order):
    """Of three layers, one with each core."""
    check(CONFIG.replace(blocks=CONFIG.blocks[2:5]), 13, chunk_size=6, packed=True, orders=(order,))


def test_configs():
    model = build(CONFIG)
    assert parse_config(CONFIG.to_json_dict()) == CONFIG
    assert CONFIG.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert rising_bounds(4) == (0.0, 0.25, 0.5, 0.75)
    with pytest.raises(ValueError, match=r"HGRN2Config\.lower_bound is 1\.0"):
        HGRN2Config(2, 2, key_dim=4, value_dim=5, lower_bound=1.0)
    with pytest.raises(ValueError, match=r"RWKV7Config has 2 heads of 8: together they must be d_model, 12"):
        sj.Decoder(CONFIG.replace(d_model=12), jax.random.key(0))
    with pytest.raises(ValueError, match=r"HGRNConfig\.num_heads 4 must be num_groups, 2"):
        HGRNConfig(4, 2, channels=5)
