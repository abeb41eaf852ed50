"""LMUFormer, its spiking variant too: token by token in float64, streamed, cut, trained in chunks, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import ModelConfig
from streamjax.models.config import (
    BlockConfig,
    ConvEmbeddingConfig,
    DenseConfig,
    LMUConfig,
    SpikingMixConfig,
    parse_config,
)
from tests.oracles import recurrent_mixers
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream
from tests.training.gradient_checks import check

VOCAB, LENGTH = 31, 24
UNIT = {"num_heads": 2, "num_groups": 2, "channels": 6, "order": 4, "theta": 9.0}


def config(spiking):
    """An embedding, a memory unit and a channel mixer."""
    embedding = BlockConfig(ConvEmbeddingConfig(2, 2, 6, depth=3, spiking=spiking), None)
    unit = LMUConfig(**UNIT, unit="spiking" if spiking else "projected")
    blocks = (BlockConfig(unit, None), BlockConfig(SpikingMixConfig(2, 2, width=6, channels=10), None))
    plain = (BlockConfig(unit, DenseConfig(20, gated=False, activation="gelu")),)
    return ModelConfig(VOCAB, 12, (embedding, *(blocks if spiking else plain)))


@pytest.mark.parametrize("spiking", [False, True])
def test_whole_and_in_pieces_it_is_the_published_rule(spiking, monkeypatch):
    rates = []
    spikes = recurrent_mixers._spikes

    def counted(*given):
        fired = spikes(*given)
        rates.append((given[1], fired.mean()))
        return fired

    monkeypatch.setattr(recurrent_mixers, "_spikes", counted)
    model, tokens = build(config(spiking)), random_tokens(2, LENGTH) % VOCAB
    expected = oracle.run(model, tokens[0], oracle.DENSE)
    whole = sj.forward(model, tokens)
    np.testing.assert_allclose(whole[0], expected, atol=1e-4)
    for name in {name for name, _ in rates}:  # every layer of neurons says something
        assert 0.02 < np.mean([rate for other, rate in rates if other == name]) < 0.98
    assert bool(rates) == spiking
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=6), batch_size=2)
    _, logits = read_stream(model, state, tokens, [5, 1])
    np.testing.assert_allclose(logits, whole, atol=1e-4)


def test_rows_of_different_lengths():
    """A row without new tokens keeps memories, potentials and inputs bit for bit; another has its own stream's."""
    model, tokens = build(config(True)), random_tokens(3, 14) % VOCAB
    cache = sj.kv.preset("streaming_llm", sinks=2, window=6)
    state, _ = sj.step(model, sj.init_state(model, cache, 3), tokens[:, :7])
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.layers)]
    state, _ = sj.step(model, state, tokens[:, 7:], jnp.array([7, 0, 3], jnp.int32))
    alone = sj.read(model, sj.init_state(model, cache, 1), tokens[2:, :10], 10)
    for old, new, own in zip(before, jax.tree.leaves(state.layers), jax.tree.leaves(alone.layers), strict=True):
        assert old[1].tobytes() == np.asarray(new)[1].tobytes()
        np.testing.assert_allclose(np.asarray(new)[2], np.asarray(own)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("spiking", "order"),
    [(False, "chunk"), *(pytest.param(True, order, marks=pytest.mark.slow) for order in ("chunk", "layer"))],
)
def test_gives_the_gradient(spiking, order):
    """Of the spiking kind weekly: its units hand on the same memory, beside potentials."""
    check(config(spiking), 13, chunk_size=6, packed=True, orders=(order,))


def test_configs():
    for spiking in (False, True):
        described = config(spiking)
        shapes = jax.eval_shape(lambda c=described: sj.Decoder(c, jax.random.key(0)))
        assert described.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert parse_config(described.to_json_dict()) == described


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (
            LMUConfig(**{**UNIT, "channels": 5}, unit="spiking"),
            "LMUConfig has 2 parts of 5: a spiking unit's are together",
        ),
        (ConvEmbeddingConfig(2, 2, 5), "ConvEmbeddingConfig has 2 parts of 5: together they must be d_model, 12"),
        (
            SpikingMixConfig(2, 2, width=5, channels=9),
            "SpikingMixConfig has 2 parts of 5: together they must be d_model",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(mixer, message):
    with pytest.raises(ValueError, match=message) as error:
        sj.Decoder(ModelConfig(VOCAB, 12, (BlockConfig(mixer, None),)), jax.random.key(0))
    assert "\n" not in str(error.value)
