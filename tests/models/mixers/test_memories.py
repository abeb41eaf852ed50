"""Mixture of memories and the Legendre memory unit: token by token in float64, streamed, trained in chunks, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.attention.legendre_memory import legendre_memory
from streamjax.models import ModelConfig
from streamjax.models.config import BlockConfig, LMUConfig, MoMConfig, parse_config
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream
from tests.training.gradient_checks import check

VOCAB, LENGTH = 31, 24
ROUTED = MoMConfig(2, 2, key_dim=4, value_dim=5, memories=3, active=2)
LEGENDRE = LMUConfig(2, 2, channels=3, order=4, theta=9.0)
CONFIG = ModelConfig(VOCAB, 16, tuple(BlockConfig(mixer, None) for mixer in (ROUTED, LEGENDRE)))


def test_whole_and_in_pieces_it_is_the_published_recurrence():
    model, tokens = build(CONFIG), random_tokens(2, LENGTH) % VOCAB
    expected = oracle.run(model, tokens[0], oracle.DENSE)
    whole = sj.forward(model, tokens)
    np.testing.assert_allclose(whole[0], expected, atol=1e-4)
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=6), batch_size=2)
    _, logits = read_stream(model, state, tokens, [5, 1])
    np.testing.assert_allclose(logits, whole, atol=1e-4)


@pytest.mark.parametrize("order", ["chunk", pytest.param("layer", marks=pytest.mark.slow)])
def test_gives_the_gradient(order):
    check(CONFIG, 13, chunk_size=6, packed=True, orders=(order,))


def test_a_memory_that_a_token_is_not_routed_to_keeps_its_state():
    """Bit for bit; the shared one and those that it is routed to change."""
    mixer = build(CONFIG).layer(0).mixer
    x = jax.random.normal(jax.random.key(1), (1, 3, 16))
    recur = jax.jit(lambda mixer, x, state, count: mixer.recur(x, state, jnp.arange(2)[None] < count)[1])
    state = recur(mixer, x[:, :2], mixer.empty(1, x.dtype), 2)
    new = recur(mixer, x[:, 1:], state, 1)
    same = [(old == now).all() for old, now in zip(state.memory[0], new.memory[0], strict=True)]
    wanted = np.asarray(mixer.shares(x[:, 1:]))[0, 0] == 0
    assert wanted.sum() == 1
    np.testing.assert_array_equal(np.reshape(same, (2, 4)), np.broadcast_to(wanted, (2, 4)))


def test_a_memory_tells_what_was_theta_tokens_ago():
    """All polynomials are 1 at the window's far end: their sum is the delayed input (Voelker et al., 2019, eq. 2)."""
    u = jnp.sin(jnp.arange(200) / 15.0)[None, :, None, None]
    memories, _ = legendre_memory(u, jnp.zeros((1, 1, 8, 1)), theta=30.0)
    np.testing.assert_allclose(memories.sum(axis=3)[0, 100:, 0, 0], u[0, 70:170, 0, 0], atol=0.04)


def test_rows_of_different_lengths_and_cuts():
    """A row without tokens keeps its memory bit for bit; any block gives the same."""
    u, state = jax.random.normal(jax.random.key(0), (3, 11, 2, 3)), jax.random.normal(jax.random.key(1), (3, 2, 4, 3))
    count = np.array([11, 0, 4])
    valid = jnp.arange(11) < count[:, None]
    whole, _ = legendre_memory(u, state, theta=9.0)
    found, new = legendre_memory(u, state, theta=9.0, valid=valid, block=3)
    np.testing.assert_allclose(found[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(new[2], whole[2, 3], atol=1e-5)
    np.testing.assert_array_equal(new[1], state[1])


def test_configs():
    model = build(CONFIG)
    assert parse_config(CONFIG.to_json_dict()) == CONFIG
    assert CONFIG.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(model))
    with pytest.raises(ValueError, match=r"MoMConfig\.active is 4: there are 3 memories"):
        MoMConfig(2, 2, key_dim=4, value_dim=5, memories=3, active=4)
    with pytest.raises(ValueError, match=r"LMUConfig\.theta is 0\.0"):
        LMUConfig(2, 2, channels=3, order=4, theta=0.0)
