"""Layers that take what one below has made: gated memory units (SambaY), RWKV-7 with the first layer's values."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import ModelConfig
from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    GMUConfig,
    RWKV7Config,
    SSDConfig,
    parse_config,
)
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream
from tests.training.gradient_checks import check

VOCAB, LENGTH = 31, 24
MLP = DenseConfig(20)
# Mamba-2 whose heads' readout two units gate, one above a layer with a window, and above them RWKV-7 with values.
SPACE = SSDConfig(4, 2, head_dim=4, state_dim=3, hands_on=True)
UNIT = GMUConfig(2, 2, channels=8)
SAMBA = ModelConfig(
    VOCAB,
    12,
    (
        BlockConfig(SPACE, MLP),
        BlockConfig(UNIT, MLP),
        BlockConfig(AttentionConfig(2, 1, 6, window=5), MLP),
        BlockConfig(UNIT, None),
    ),
)
# SambaY's decoder-hybrid-decoder: Mamba-2, a window and one layer of full attention; above it units on what Mamba-2 has
# read, and attention to the keys of the full layer.
WHOLE = ModelConfig(
    VOCAB,
    12,
    (
        BlockConfig(SPACE, MLP),
        BlockConfig(AttentionConfig(2, 1, 6, window=5), MLP),
        BlockConfig(AttentionConfig(2, 1, 6, hands_on_keys=True), MLP),
        BlockConfig(UNIT, MLP),
        BlockConfig(AttentionConfig(2, 1, 6, keys_of=2), MLP),
    ),
)
VALUES = ModelConfig(
    VOCAB,
    16,
    (
        BlockConfig(RWKV7Config(2, 2, head_dim=8, rank=3, values="hands_on"), None),
        BlockConfig(RWKV7Config(2, 2, head_dim=8, rank=3, values="takes"), None),
    ),
)


@pytest.mark.parametrize("config", [SAMBA, VALUES], ids=["gmu", "rwkv7"])
def test_whole_and_in_pieces_it_is_the_published_rule(config):
    model, tokens = build(config), random_tokens(2, LENGTH) % VOCAB
    whole = sj.forward(model, tokens)
    np.testing.assert_allclose(whole[0], oracle.run(model, tokens[0], oracle.DENSE), atol=1e-4)
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=6), batch_size=2)
    _, logits = read_stream(model, state, tokens, [5, 1])
    np.testing.assert_allclose(logits, whole, atol=1e-4)
    assert state.hidden.shape == (2, config.d_model)


@pytest.mark.slow
def test_a_decoder_on_a_decoder():
    """Both kinds of what is handed on, in one model: the rule, a stream that keeps one layer's keys, the gradient."""
    model, tokens = build(WHOLE), random_tokens(2, LENGTH) % VOCAB
    whole = sj.forward(model, tokens)
    np.testing.assert_allclose(whole[0], oracle.run(model, tokens[0], oracle.DENSE), atol=1e-4)
    state = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), batch_size=2)
    slots = [getattr(cache, "slots", 0) for cache in state.caches]
    assert slots[2] == LENGTH > sum(slots) - LENGTH
    _, logits = read_stream(model, state, tokens, [5, 1])
    np.testing.assert_allclose(logits, whole, atol=1e-4)
    check(WHOLE, 13, chunk_size=6, packed=True, orders=("chunk",))


@pytest.mark.slow
def test_a_long_stretch_is_read_layer_by_layer():
    """By other programs than single chunks are; what is handed on goes from one to the next."""
    model, tokens = build(SAMBA), random_tokens(1, LENGTH) % VOCAB
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=6))
    _, nats = sj.score(model, state, tokens, chunk_size=8)
    logp = jax.nn.log_softmax(sj.forward(model, tokens))
    expected = -np.take_along_axis(np.asarray(logp)[0, :-1], tokens[0, 1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(nats[0, 1:], expected, atol=1e-4)


@pytest.mark.usual("chunk")
@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_gives_the_gradient(order):
    """The cotangent of what is handed on goes down with the residual stream's."""
    check(SAMBA, 13, chunk_size=6, packed=True, orders=(order,))


@pytest.mark.slow
@pytest.mark.parametrize("config", [SAMBA.replace(blocks=SAMBA.blocks[:2] * 2), VALUES], ids=["stacked", "rwkv7"])
def test_gives_the_gradient_stacked_and_of_other_mixers(config):
    check(config, 13, chunk_size=6, stacked=config is not VALUES, orders=("remat", "layer", "chunk"))


def test_configs():
    for config in (SAMBA, VALUES):
        shapes = jax.eval_shape(lambda config=config: sj.Decoder(config, jax.random.key(0)))
        assert config.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert parse_config(config.to_json_dict()) == config
    assert (SAMBA.stream_width, VALUES.handed_on) == (12 + 16, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAMBA.replace(blocks=SAMBA.blocks[1:]), "layer 0 takes 16 channels, and no layer below hands any on"),
        (
            lambda: SAMBA.replace(blocks=(SAMBA.blocks[0], BlockConfig(GMUConfig(2, 2, channels=5), None))),
            "layer 1 takes 10 channels, and layers below hand on 16",
        ),
        (
            lambda: SAMBA.replace(
                blocks=(SAMBA.blocks[0], BlockConfig(SSDConfig(2, 2, head_dim=4, state_dim=3, hands_on=True), None))
            ),
            "layer 1 hands on 8 channels, and one below 16",
        ),
        (lambda: BlockConfig(AttentionConfig(2, 1, 6), MLP, beside=SPACE), "BlockConfig.beside hands nothing on"),
    ],
)
def test_what_does_not_fit_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
