"""Draft heads learn what a model says: the loss against plain loops, and a model that they come to know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.streaming.speculative.heads.hydra import HydraWeights, head_state
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary, embedded
from streamjax.training.heads.drafting import (
    DraftHeadsConfig,
    as_file,
    first_weights,
    frequent_ids,
    hydra_loss,
    train_draft_heads,
)
from streamjax.training.heads.text_rows import text_rows
from tests.streaming.tiny_models import GQA, build, random_tokens

IDS = np.array([1, 2, 3, 5, 8, 13, 21], np.int32)


def test_the_loss_of_each_place():
    """Head i at t is held against the model at t + i."""
    model, tokens = build(GQA), random_tokens(1, 6)
    weights = first_weights(DraftHeadsConfig(heads=2, width=5), 16)
    weights = HydraWeights(weights.inward, tuple(x + 0.3 for x in weights.outward))
    vocabulary = DraftVocabulary.of(model, jnp.asarray(IDS))
    hidden = jax.jit(lambda model, tokens: model.hidden(tokens))(model, jnp.asarray(tokens))
    said, own = vocabulary.logits(model, hidden), embedded(model, jnp.asarray(tokens))
    loss, right = jax.jit(hydra_loss)(weights, model, vocabulary, jnp.asarray(tokens), hidden, said)
    losses, hits = [], []
    for i in (1, 2):
        mine, agrees = [], []
        for t in range(6 - i):
            logits = vocabulary.logits(model, head_state(weights, i, hidden[0, t], own[0, t + 1 : t + 1 + i]))
            wanted = np.exp(np.asarray(said[0, t + i], np.float64))
            logp = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum())
            mine.append(-(wanted / wanted.sum() * logp).sum())
            agrees.append(np.argmax(logits) == np.argmax(said[0, t + i]))
        losses.append(np.mean(mine))
        hits.append(np.mean(agrees))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(right, hits)


@pytest.mark.slow
def test_heads_come_to_know_a_model():
    """On rows that come again and again."""
    model, text = build(GQA), random_tokens(40, seed=3)
    config = DraftHeadsConfig(heads=2, steps=60, learning_rate=1e-2, width=32)
    ids = frequent_ids(text, 30)
    steps = list(train_draft_heads(model, ids, text_rows(text, 24, 2), config))
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert min(steps[-1].right) > max(steps[0].right)
    file = as_file(model, ids, steps[-1].weights, 99)
    assert [x.shape for x in file.inward] == [(32, 32), (48, 32)]


def test_frequent_ids():
    assert frequent_ids(np.array([7, 2, 2, 9, 7, 7, 4]), 2).tolist() == [2, 7]
    assert frequent_ids(np.array([3, 1]), 9).tolist() == [1, 3]
