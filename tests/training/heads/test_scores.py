"""Echo and induction scores: by loops over all pairs of tokens, in a model made by hand; which heads they protect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.mixers.attention import SequenceContext
from streamjax.training.heads import scores as module
from streamjax.training.heads.scores import HeadScores, head_scores, protected_heads, repeated_tokens
from tests.streaming.tiny_models import build, with_sink_logits
from tests.training.gradient_checks import CONFIG, random_model

ALIBI = CONFIG.replace(position="alibi", alibi_slopes=(0.7, 0.35, 0.2, 0.05))
CAPPED = CONFIG.replace(attention_softcap=2.0, windows=(6, None))


def by_loops(model, tokens):
    """Scores [2, L, H] in float64, pair by pair; of the model only its projections and its residual stream are used."""
    layers, (rows, length) = model.config.blocks, tokens.shape
    position = jnp.broadcast_to(jnp.arange(length), tokens.shape).astype(jnp.uint32)
    context = SequenceContext(position, None, length)
    apply = jax.jit(lambda block, x: (*block.project(x, context)[:2], block.parallel(x, context)[0]))
    found, x = np.zeros((2, len(layers), layers[0].mixer.num_heads)), model.embed(jnp.asarray(tokens))
    for layer in range(len(layers)):
        config = layers[layer].mixer
        q, k, x = apply(model.layer(layer), x)
        q, k = np.asarray(q), np.asarray(k)
        for head in range(config.num_heads if config.window is None else 0):
            mass, count = np.zeros(2), np.zeros(2)
            for row in range(rows):
                for i in range(length):
                    logits = k[row, : i + 1, head // config.group_size] @ q[row, i, head] * config.softmax_scale
                    if config.softcap:
                        logits = config.softcap * np.tanh(logits / config.softcap)
                    if config.alibi_slopes:
                        logits -= config.alibi_slopes[head] * (i - np.arange(i + 1))
                    sinks = model.layer(layer).mixer.sink_logits
                    share = np.exp(logits)
                    share /= share.sum() + (0 if sinks is None else np.exp(np.asarray(sinks[head])))
                    echo = [j for j in range(i) if tokens[row, j] == tokens[row, i]]
                    induction = [j for j in range(1, i) if tokens[row, j - 1] == tokens[row, i]]
                    mass += share[echo].sum(), share[induction].sum()
                    count += bool(echo), bool(induction)
            found[:, layer, head] = mass / count
    return found


@pytest.mark.parametrize(
    "config", [ALIBI.expand(), with_sink_logits(CAPPED)], ids=["alibi", "rope-softcap-window-sink-logits"]
)
def test_scores_by_loops(config, monkeypatch):
    """Rows of different tokens, some of them twice in a row, and blocks of queries that do not fit the length."""
    monkeypatch.setattr(module, "_BLOCK", 5)
    drawn = np.random.default_rng(0).integers(0, 6, (2, 6))
    tokens = np.tile(drawn, 3)[:, :17].astype(np.int32)
    with jax.enable_x64(True):
        model = random_model(config)
        found = jax.jit(head_scores.__wrapped__)(model, jnp.asarray(tokens))
        expected = by_loops(model, tokens)
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-6)
    far = [i for i, block in enumerate(config.blocks) if block.mixer.window is None]
    assert expected[:, far].min() > 0.01


def test_a_head_that_sees_its_own_token_only_has_the_score_of_an_echo_head():
    """Queries and keys of the first head are the token's own direction, of the second head nothing."""
    size, repeats = 8, 4
    config = sj.UniformConfig(
        vocab_size=size, d_model=size, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=size, mlp_dim=4,
        position="none",
    )  # fmt: skip
    model = build(config)
    model.embedding[...] = jnp.eye(size)
    own = 5.0 * jnp.eye(size)
    qkv = jnp.zeros((size, 2, 3, size)).at[:, 0, 0].set(own).at[:, 0, 1].set(own)
    model.layers[0].mixer.projections.qkv[...] = qkv
    tokens = repeated_tokens(model.config, size, repeats)
    echo, induction = (np.asarray(score)[0] for score in head_scores(model, tokens))
    # In the second, third and fourth turn 1 of 2, 2 of 3 and 3 of 4 occurrences are earlier ones.
    assert echo[0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-4)
    assert induction[0] == pytest.approx(0.0, abs=1e-4)
    places = np.arange(size, repeats * size)
    assert echo[1] == pytest.approx(np.mean(places // size / (places + 1)), abs=1e-5)
    scores = HeadScores(echo[None], induction[None])
    gates, far = protected_heads(scores, model.config, echo=0.5, induction=0.0)
    np.testing.assert_array_equal(far, [[True, False]])
    assert gates[0, 0] == pytest.approx((1 + echo[0]) / 2)


@pytest.mark.quick
def test_repeated_tokens():
    config = CONFIG.replace(vocab_size=20, bos_token_id=3, eos_token_ids=(4, 7)).expand()
    tokens = repeated_tokens(config, 17, repeats=3, rows=2, seed=1)
    assert tokens.shape == (2, 1 + 3 * 17)
    np.testing.assert_array_equal(tokens[:, 0], 3)
    turns = tokens[:, 1:].reshape(2, 3, 17)
    np.testing.assert_array_equal(turns, turns[:, :1].repeat(3, axis=1))
    assert all(sorted(row[0].tolist()) == sorted(set(range(20)) - {3, 4, 7}) for row in turns)
    assert turns[0].tolist() != turns[1].tolist()
    assert repeated_tokens(CONFIG.expand(), 50).shape == (1, 200)  # more than there are in the vocabulary, no BOS
    assert repeated_tokens(config, 17, seed=2)[0].tolist() != repeated_tokens(config, 17, seed=1)[0].tolist()


@pytest.mark.quick
def test_the_best_query_heads_protect_their_key_head():
    config = CONFIG.replace(num_layers=3, windows=(None, 4, None))  # 4 query heads, 2 key heads
    echo = np.array([[0.1, 0.2, 0.3, 0.0], [0.9] * 4, [0.05, 0.0, 0.0, 0.0]])
    induction = np.array([[0.0, 0.0, 0.0, 0.0], [0.9] * 4, [0.0, 0.0, 0.6, 0.7]])
    gates, far = protected_heads(HeadScores(echo, induction), config.expand(), echo=0.01, induction=0.25)
    np.testing.assert_array_equal(far, [[False, True], [False, False], [False, True]])
    np.testing.assert_allclose(gates, [[0.1, 0.65], [0.0, 0.0], [0.025, 0.85]])
    _, far = protected_heads(HeadScores(echo, induction), config.expand(), echo=0.0, induction=0.0)
    assert not far.any()
    gates, far = protected_heads(HeadScores(echo * 0 + 1.0, induction), config.expand(), echo=1.0, induction=0.0)
    np.testing.assert_array_equal(far, [[True, True], [False, False], [True, True]])
    assert gates.max() <= 1.0


@pytest.mark.quick
def test_what_has_no_scores_is_refused():
    with pytest.raises(ValueError, match="2 tokens, 2 repeats and 1 row are the least, got 1, 4 and 1"):
        repeated_tokens(CONFIG.expand(), 1)
    with pytest.raises(ValueError, match="special tokens only"):
        repeated_tokens(CONFIG.replace(vocab_size=1, bos_token_id=0).expand(), 4)
    scores = HeadScores(np.zeros((2, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 0.01 and 2"):
        protected_heads(scores, CONFIG.expand(), induction=2)
    with pytest.raises(ValueError, match="every layer of the model has a sliding window"):
        protected_heads(scores, CONFIG.replace(windows=(4, 4)).expand())
