"""Draft heads learn what a model says: the loss against plain loops, and a model that they come to know."""

import dataclasses
import itertools

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
    from_file,
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
    vocabulary = DraftVocabulary.from_model(model, jnp.asarray(IDS))
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


FEW = DraftHeadsConfig(heads=2, steps=4, learning_rate=1e-2, width=8)


def test_what_is_kept_of_rows_changes_nothing():
    """With room for all rows, for one, and for none."""
    model, text = build(GQA), random_tokens(40, seed=3)

    def run(kept_bytes: int) -> list[float]:
        rows = text_rows(text, 9, 2, apart=9)
        return [step.loss for step in train_draft_heads(model, IDS, rows, FEW, kept_bytes=kept_bytes)]

    assert run(1 << 20) == run(9 * 16 * 4) == run(0)


def test_training_goes_on_from_a_file(tmp_path):
    """The first loss of a second run is what the first run finds next; heads of other sizes are refused."""
    model, text = build(GQA), random_tokens(40, seed=3)
    rows = list(itertools.islice(text_rows(text, 9, 2, apart=9), 4))
    steps = train_draft_heads(model, IDS, rows, FEW)
    third = list(itertools.islice(steps, 3))[-1]
    as_file(model, IDS, third.weights, 54).save(tmp_path / "heads.safetensors")
    start, tokens = from_file(model, tmp_path / "heads.safetensors")
    assert tokens == 54
    fresh, more = (next(train_draft_heads(model, IDS, rows[3:], FEW, start=x)).loss for x in (None, start))
    assert more == next(steps).loss != fresh
    with pytest.raises(ValueError, match="heads to go on from have matrices of"):
        next(train_draft_heads(model, IDS, rows, dataclasses.replace(FEW, width=4), start=start))
    with pytest.raises(ValueError, match="these draft heads were trained for another model"):
        from_file(build(GQA, seed=5), tmp_path / "heads.safetensors")


def test_rows_apart():
    text = np.arange(100)
    batches = text_rows(text, 10, 4, seed=2, apart=10)
    starts = {int(row[0]) for _, batch in zip(range(40), batches, strict=False) for row in batch}
    assert starts == set(range(0, 90, 10))


def test_frequent_ids():
    assert frequent_ids(np.array([7, 2, 2, 9, 7, 7, 4]), 2).tolist() == [2, 7]
    assert frequent_ids(np.array([3, 1]), 9).tolist() == [1, 3]
