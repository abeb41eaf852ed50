"""Layers that compute some blocks of tokens: against plain loops over tokens, heads and blocks, in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.models.mixers.attention import SequenceContext
from streamjax.training import LeMoConfig, loss_and_grad
from streamjax.training.elimination.informativeness import block_scores, last_seeing, pair_scores, seeing
from streamjax.training.elimination.kept_tokens import highest
from streamjax.training.elimination.learning import PredictorTraining, share_found
from streamjax.training.elimination.predictors import draw_predictor, guessed_scores
from streamjax.training.elimination.predictors_file import LayerPredictor, LayerPredictors
from streamjax.training.objectives.objective import CrossEntropy, token_stats
from tests.covering import rest_slow
from tests.training.gradient_checks import CONFIG, assert_same, random_batch, random_model

SIZE, LENGTH, ROWS = 4, 24, 2
BLOCKS = LENGTH // SIZE


def relu_network(network, x):
    """Three matrices, ReLU between them."""
    first, second, last = (np.asarray(matrix, np.float64) for matrix in network)
    return np.maximum(np.maximum(x @ first, 0) @ second, 0) @ last


def sees(m, n, segments):
    """Whether some query of block m sees some key of block n."""
    pairs = itertools.product(range(m * SIZE, (m + 1) * SIZE), range(n * SIZE, (n + 1) * SIZE))
    return any(i >= j and segments[i] == segments[j] for i, j in pairs)


def choose_by_loops(predictor, said, segments, count):
    """Blocks of one row by a predictor, from what the mixer reads [T, E]."""
    spoken = [
        [
            np.mean([relu_network(network, said[t]) for t in range(b * SIZE, (b + 1) * SIZE)], axis=0)
            for b in range(BLOCKS)
        ]
        for network in predictor
    ]
    scores = []
    for n in range(BLOCKS):
        scores.append(np.mean([spoken[0][m] @ spoken[1][n] for m in range(BLOCKS) if sees(m, n, segments)]))
    return sorted(np.argsort(-np.array(scores), kind="stable")[:count])


def masked_layer(block, x, context, kept):
    """A layer over whole rows of which only `kept` [B, T] tokens read, are read, and change."""
    q, k, v = block.project(x, context)
    group = q.shape[2] // k.shape[2]
    logits = jnp.einsum("bihd,bjhd->bhij", q, jnp.repeat(k, group, axis=2)) * block.attention.config.softmax_scale
    index = jnp.arange(x.shape[1])
    visible = (index[:, None] >= index) & kept[:, None, :]
    visible &= context.segment_ids[:, :, None] == context.segment_ids[:, None, :]
    logits = jnp.where(visible[:, None], logits, -1e30)
    heads = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(logits, axis=-1), jnp.repeat(v, group, axis=2))
    return jnp.where(kept[..., None], block.combine(x, heads), x)


def drawn_file(dtype=np.float64):
    """Predictors of CONFIG's two layers whose blocks score differently."""
    draw, layers = np.random.default_rng(5), []
    for scores in (draw.lognormal(size=400), draw.uniform(size=400)):
        drawn = draw_predictor(draw, CONFIG.d_model, 8, 3)
        predictor = jax.tree.map(lambda x: jnp.asarray(x, dtype), drawn)
        layers.append(LayerPredictor.of(predictor, scores, SIZE))
    return LayerPredictors(tuple(layers), "model", 0)


def packed_batch():
    """Two rows; a document ends inside of a block, and one at the end of a block."""
    batch = random_batch(CONFIG.vocab_size, ROWS, LENGTH)
    ids = np.array([[1] * 10 + [2] * 14, [1] * 12 + [2] * 12], np.int32)
    starts = np.stack([np.searchsorted(row, row) for row in ids])
    return batch | {"segment_ids": ids, "positions": (np.arange(LENGTH) - starts).astype(np.int32)}


@pytest.fixture(scope="module")
def expected():
    """Model, batch, file, shares, and the loss and gradient by loops and masks."""
    with jax.enable_x64(True):
        model, batch, file = random_model(CONFIG, stacked=True), packed_batch(), drawn_file()
        shares = (0.5, 0.7)
        ids = batch["segment_ids"]
        context = SequenceContext(jnp.asarray(batch["positions"], jnp.uint32), jnp.asarray(ids), LENGTH)
        known = [np.zeros((ROWS, LENGTH), bool) for _ in shares]

        @jax.jit
        def layer(block, x, kept):
            return masked_layer(block, x, context, kept)

        @jax.jit
        def mixer_input(block, x):
            return block.mixer_input(x)

        def forward(model, kept, read=None):
            x = model.embed(jnp.asarray(batch["tokens"]))
            for i in range(len(kept)):
                block = model.layer(i)
                if read is not None:
                    read(i, mixer_input(block, x))
                x = layer(block, x, jnp.asarray(kept[i]))
            return model.norm(x)

        def choose(i, said):  # called while the arrays of the layers below are settled
            count = round(shares[i] * BLOCKS)
            for row in range(ROWS):
                for b in choose_by_loops(file.layers[i].predictor, np.asarray(said[row]), ids[row], count):
                    known[i][row, b * SIZE : (b + 1) * SIZE] = True

        forward(model, known, choose)
        assert (known[0] != known[1]).any()
        prepared = CrossEntropy().prepare({name: jnp.asarray(x) for name, x in batch.items()})

        def loss(model):
            return CrossEntropy().loss(token_stats(model.logits(forward(model, known)), prepared["targets"]), prepared)

        return model, batch, file, shares, jax.jit(jax.value_and_grad(loss))(model)


@pytest.mark.parametrize("method", rest_slow(["full", "remat"], "remat"))
def test_the_gradient_is_that_of_layers_with_masks(expected, method):
    model, batch, file, shares, wanted = expected
    with jax.enable_x64(True):
        elimination = dataclasses.replace(file.elimination(model, 0.5), shares=shares)
        assert elimination.counts(LENGTH) == [3, 4]
        found = loss_and_grad(model, batch, method, elimination=elimination)
        assert_same(found, wanted)


def test_all_tokens_are_full_bit_for_bit():
    model, batch = random_model(CONFIG, "float32", stacked=True), packed_batch()
    elimination = drawn_file(np.float32).elimination(model, 1.0)
    assert elimination.counts(LENGTH) == [BLOCKS, BLOCKS]
    found, plain = (loss_and_grad(model, batch, elimination=e) for e in (elimination, None))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_scores_are_those_of_loops():
    draw, ids = np.random.default_rng(1), packed_batch()["segment_ids"]
    q, k = draw.normal(size=(ROWS, LENGTH, 4, 3)), draw.normal(size=(ROWS, LENGTH, 2, 3))
    expected = np.zeros((ROWS, BLOCKS, BLOCKS))
    for b, i, j in itertools.product(range(ROWS), range(LENGTH), range(LENGTH)):
        if i >= j and ids[b, i] == ids[b, j]:
            score = sum(max(0.0, float(q[b, i, h] @ k[b, j, h // 2]) * 0.5) for h in range(4)) / 4
            place = b, i // SIZE, j // SIZE
            expected[place] = max(expected[place], score)
    seen = np.array([[[sees(m, n, row) for n in range(BLOCKS)] for m in range(BLOCKS)] for row in ids])
    last = last_seeing(ROWS, LENGTH, SIZE, jnp.asarray(ids))
    np.testing.assert_array_equal(seeing(last), seen)
    pairs = pair_scores(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), SIZE, 0.5, jnp.asarray(ids))
    np.testing.assert_allclose(pairs, expected, rtol=1e-5)
    scores = np.where(seen, expected, 0).sum(1) / seen.sum(1)
    np.testing.assert_allclose(block_scores(pairs, jnp.asarray(seen)), scores, rtol=1e-5)
    np.testing.assert_array_equal(last_seeing(1, LENGTH, SIZE, None), [[BLOCKS - 1] * BLOCKS])


def test_equal_scores_and_what_was_found():
    scores = jnp.array([[1.0, 3.0, 3.0, 2.0, 3.0]])
    np.testing.assert_array_equal(highest(scores, 2), [[1, 2]])
    assert share_found(jnp.array([[9.0, 0, 8, 0, 0]]), scores, 0.4) == 0.5


def test_shares_are_those_of_one_threshold(tmp_path):
    file = drawn_file(np.float32)
    file.save(tmp_path / "predictors.safetensors")
    file = LayerPredictors.load(tmp_path / "predictors.safetensors")
    first, second = file.shares(0.4)
    assert first + second == pytest.approx(0.8, abs=1e-4)
    draw = np.random.default_rng(5)
    scores = [draw.lognormal(size=400)]
    draw_predictor(draw, CONFIG.d_model, 8, 3)
    levels = np.sort(scores[0] / scores[0].mean())
    threshold = levels[400 - round(first * 400)]
    assert file.layers[1].share_above(threshold) == pytest.approx(second, abs=0.02)
    assert (file.shares(0.4, equal=True), file.shares(1.0)) == ((0.4, 0.4), (1.0, 1.0))
    with pytest.raises(ValueError, match="token predictors of 2 layers with 16 channels are not for a model of 1"):
        file.elimination(random_model(CONFIG.replace(num_layers=1), "float32"), 0.5)


def test_predictors_learn_the_scores():
    model = random_model(CONFIG, "float32", stacked=True)
    config = LeMoConfig(share=0.5, block=SIZE, steps=6, updates=40, width=8, channels=4, learning_rate=1e-2)
    training, batch = PredictorTraining(model, config), packed_batch()
    steps = list(training.steps([batch] * config.steps))
    assert steps[-1].loss < 0.1 < steps[0].loss
    assert steps[-1].found > 0.6
    layer = training.result().layers[1]
    context = SequenceContext(jnp.asarray(batch["positions"], jnp.uint32), jnp.asarray(batch["segment_ids"]), LENGTH)

    @jax.jit
    def both(model, predictor):
        x = model.layer(0).parallel(model.embed(jnp.asarray(batch["tokens"])), context)[0]
        block = model.layer(1)
        q, k, _ = block.project(x, context)
        last = last_seeing(ROWS, LENGTH, SIZE, context.segment_ids)
        scores = block_scores(pair_scores(q, k, SIZE, 4**-0.5, context.segment_ids), seeing(last))
        return scores, guessed_scores(predictor, block.mixer_input(x), SIZE, last)

    scores, guesses = both(model, layer.predictor)
    np.testing.assert_allclose(guesses, scores, rtol=0.35)
    np.testing.assert_allclose(
        layer.quantiles[0, [0, -1]], np.array([scores.min(), scores.max()]) / scores.mean(), 1e-4
    )
