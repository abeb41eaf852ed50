"""Prefix linear attention: each token of a prompt sees all of it, as in plain float64; streamed and trained."""

import contextlib

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.data.prefix_rows import prefix_batch
from streamjax.data.text.tokenizers import ByteTokenizer
from streamjax.models import ModelConfig
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, PrefixLinearConfig, SSDConfig
from streamjax.parallel.mesh import make_mesh
from tests.oracles import streaming_llm as oracle
from tests.oracles.recurrent_mixers import first_look
from tests.streaming.tiny_models import build, random_tokens
from tests.training.gradient_checks import assert_same, gradient, random_batch, random_model

VOCAB, LENGTH, PREFIX = 31, 20, (9, 5)
TAYLOR = PrefixLinearConfig(2, 2, key_dim=4, value_dim=5)
ELU = PrefixLinearConfig(2, 2, key_dim=3, value_dim=4, features="elu")
WINDOW = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=6)
CONFIG = ModelConfig(
    VOCAB, 16, (BlockConfig(TAYLOR, None), BlockConfig(WINDOW, DenseConfig(12), beside=ELU), BlockConfig(TAYLOR, None))
)
CACHE = sj.kv.preset("streaming_llm", sinks=2, window=6)


def by_hand(model, tokens, prefix):
    """Logits of one stream, layer by layer: a layer looks at the prefix, and then reads token by token."""
    xs = [np.asarray(model.embedding[...], np.float64)[int(token)] for token in tokens]
    for layer in (model.layer(i) for i in range(model.config.num_layers)):
        mixer = layer.mixer if layer.beside is None else layer.beside
        rule = oracle.DENSE if layer.config.mixer.recurrent else oracle.Rule(0, layer.config.mixer.window - 1)
        state, cache, out = [], [], []
        first_look(mixer, [oracle.norm(x, layer.mixer_norm) for x in xs[:prefix]], state)
        for x in xs:
            out.append(oracle.block(layer, x, cache, rule, state, [], np.zeros(1)))
            cache = rule.keep(cache)
        xs = out
    head = np.asarray(model.head[...], np.float64)
    return np.stack([oracle.norm(x, model.norm) @ head for x in xs])


@pytest.fixture(scope="module")
def case():
    """A model, two rows, and the logits of both with a prefix each."""
    model, tokens = build(CONFIG), random_tokens(2, LENGTH) % VOCAB
    return model, tokens, np.asarray(sj.forward(model, tokens, prefix=np.array(PREFIX)))


def test_is_the_published_rule(case):
    model, tokens, whole = case
    for row, size in enumerate(PREFIX):
        np.testing.assert_allclose(whole[row], by_hand(model, tokens[row], size), atol=1e-4)
    without = sj.forward(model, tokens)
    np.testing.assert_allclose(without[0], oracle.run(model, tokens[0], oracle.DENSE), atol=1e-4)
    np.testing.assert_array_equal(sj.forward(model, tokens, prefix=np.zeros(2, int)), without)


@pytest.mark.parametrize("size", [64, pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_is_the_whole_sequence(case, size):
    """However the prefix is cut; behind it tokens are read as ever, and each row has its own length."""
    model, tokens, whole = case
    rows = [row[:first] for row, first in zip(tokens, PREFIX, strict=True)]
    state = sj.read_prefix(model, sj.init_state(model, CACHE, 2), rows, size)
    last = model.logits(state.hidden[:, None])[:, 0]
    np.testing.assert_allclose(last, [whole[i, first - 1] for i, first in enumerate(PREFIX)], atol=1e-4)
    rest = np.stack([row[first:][:11] for row, first in zip(tokens, PREFIX, strict=True)])
    for start, width in ((0, 7), (7, 1), (8, 1), (9, 1), (10, 1)):
        state, logits = sj.step(model, state, rest[:, start : start + width])
        for i, first in enumerate(PREFIX):
            here = first + start
            np.testing.assert_allclose(logits[i], whole[i, here : here + width], atol=1e-4)


def test_rows_without_a_prefix_keep_their_states(case):
    """Bit for bit; and a second prefix is looked at by what comes behind it alone."""
    model, tokens, _ = case
    state = sj.read_prefix(model, sj.init_state(model, CACHE, 2), tokens[:, :6], 4)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.layers)]
    state = sj.read_prefix(model, state, [tokens[0, 6:9], []], 4)
    for old, new in zip(before, jax.tree.leaves(state.layers), strict=True):
        assert old[1].tobytes() == np.asarray(new)[1].tobytes()
        assert old.ndim < 4 or old[0].tobytes() != np.asarray(new)[0].tobytes()


def test_a_session_reads_a_prefix():
    model = build(CONFIG.replace(vocab_size=259))
    text = "What is asked is known first."
    session = sj.Session(model, ByteTokenizer(), CACHE, chunk_size=4)
    assert session.read(text, prefix=True, add_bos=False) == len(text)
    ids = np.frombuffer(text.encode(), np.uint8)[None].astype(np.int32)
    expected = sj.forward(model, ids, prefix=np.array([len(text)]))[:, -1]
    np.testing.assert_allclose(model.logits(session.state.hidden[:, None])[:, 0], expected, atol=1e-4)


WEEKLY = [("remat", {}), ("layer", {}), ("layer", {"data": 2}), ("chunk", {"tensor": 2}), ("remat", {"context": 2})]


@pytest.mark.parametrize(
    ("method", "axes"), [("chunk", {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in WEEKLY)]
)
def test_every_order_gives_the_gradient(method, axes):
    """Of a layer that is the mixer, and of one with the mixer beside attention: two programs of three seconds."""
    config = CONFIG.replace(blocks=(BlockConfig(TAYLOR, None), CONFIG.blocks[1]))
    with jax.enable_x64(True):
        model, batch = random_model(config), random_batch(VOCAB, 2, 14) | {"prefix": np.array([6, 4], np.int32)}
        options, expected = {} if method == "remat" else {"chunk_size": 6}, gradient(model, batch, "full")
        with jax.set_mesh(make_mesh(**axes, devices=jax.devices()[:2])) if axes else contextlib.nullcontext():
            assert_same(gradient(model, batch, method, **options), expected)


def test_refusals(case):
    model, tokens, _ = case
    batch = random_batch(VOCAB, 2, 13, packed=True) | {"prefix": np.array([8, 4], np.int32)}
    with pytest.raises(ValueError, match="packed rows have several documents"):
        sj.training.loss_and_grad(model, batch)
    del batch["segment_ids"], batch["positions"]
    with pytest.raises(ValueError, match=r"a prefix has 8 tokens and a chunk 6.* chunk_size=8 or more"):
        sj.training.loss_and_grad(model, batch, "chunk", chunk_size=6)
    with pytest.raises(ValueError, match="the batch has prefixes, which only"):
        sj.training.token_log_probs(model, batch | {"targets": tokens[:, :13]})
    with pytest.raises(ValueError, match=r"prefix is \[2, 1\], tokens \[2, 13\]: prefix must be \[2\]"):
        sj.training.loss_and_grad(model, batch | {"prefix": np.ones((2, 1), np.int32)})
    state = sj.init_state(model, CACHE, 2)
    other = jax.eval_shape(lambda: build(CONFIG.replace(blocks=(BlockConfig(SSDConfig(2, 2, 4, 4), None),))))
    for ask in (
        lambda: sj.read_prefix(other, state, tokens),
        lambda: sj.forward(other, tokens, prefix=np.zeros(2, int)),
    ):
        with pytest.raises(ValueError, match="no layer of this model looks at a prefix ahead"):
            ask()


def test_under_jit_a_prefix_of_several_chunks_has_no_loss(case):
    """Its length is not known when the program is made."""
    batch = random_batch(VOCAB, 2, 13) | {"prefix": np.array([8, 4], np.int32)}
    assert np.isnan(gradient(case[0], batch, "chunk", chunk_size=6)[0])


def test_rows_with_two_losses():
    """Of hidden tokens themselves, and of those behind the prefix the next ones; each loss is a mean."""
    random = np.random.default_rng(0)
    tokens, prefix = (
        random.integers(0, VOCAB, (8, 41)).astype(np.int32),
        np.array([0, 1, 40, 30, 7, 20, 20, 20], np.int32),
    )
    batch = prefix_batch(tokens, prefix, VOCAB, random=random, share=0.3)
    hidden, predicted = [], []
    for row in range(8):
        for t in range(40):
            known, last = batch["tokens"][row, t], max(prefix[row] - 1, 0)
            if known == VOCAB:
                assert t < last
                assert batch["targets"][row, t] == tokens[row, t]
                hidden.append(batch["weights"][row, t])
                continue
            assert (known, batch["targets"][row, t]) == (tokens[row, t], tokens[row, t + 1])
            assert batch["weights"][row, t] == (t >= last)
            predicted.append(batch["weights"][row, t])
    assert 20 < len(hidden) < 60
    np.testing.assert_allclose(np.sum(hidden), 0.25 * np.sum(predicted), rtol=1e-6)
    with pytest.raises(ValueError, match=r"prefix is \[41\]: a row has 40 tokens"):
        prefix_batch(tokens[:1], np.array([41], np.int32), VOCAB, random=random)


def test_configs():
    assert (PrefixLinearConfig(2, 2).feature_dim, ELU.feature_dim) == (1 + 16 + 136, 3)
    shapes = jax.eval_shape(lambda: build(CONFIG))
    assert CONFIG.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert ModelConfig.from_json_dict(CONFIG.to_json_dict()) == CONFIG
