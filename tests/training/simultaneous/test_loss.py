"""Rows of wait-k, and what they cost, against a plain float64 model with given positions and masks."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.training.simultaneous import GroupedRows, group_positions, grouped_loss, grouped_nats, wait_k_rows
from tests.oracles.grouped_llama import PlainLlama
from tests.streaming.tiny_models import GQA, LOCAL, build

PAIRS = [([5, 9, 2, 30], [1, 7, 8, 3]), ([4, 4], [1, 6, 11, 2, 9])]


@pytest.fixture(scope="module")
def model():
    return build(GQA)


def test_rows_are_in_the_order_of_reading():
    rows = wait_k_rows(PAIRS, wait=2)
    assert rows.tokens.tolist() == [[5, 9, 1, 2, 7, 30, 8], [4, 4, 1, 6, 11, 2, 0]]
    assert rows.outputs.astype(int).tolist() == [[0, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert rows.targets.tolist() == [[-1, -1, 7, -1, 8, -1, 3], [-1, -1, 6, 11, 2, 9, -1]]
    whole = wait_k_rows(PAIRS[:1], wait=None, begin=2, length=5)  # as in a batch, and cut
    assert whole.tokens.tolist() == [[5, 9, 2, 30, 1]]
    assert whole.targets.tolist() == [[-1] * 5]
    for act, message in (
        (lambda: wait_k_rows([], 1), "there are no pairs"),
        (lambda: wait_k_rows(PAIRS, 1, begin=4), "an output of 4 tokens, of which 4 are given"),
        (lambda: wait_k_rows(PAIRS, -1), "wait -1"),
    ):
        with pytest.raises(ValueError, match=message):
            act()


def expected(plain: PlainLlama, rows: GroupedRows, first: int | None, mutual: bool) -> list[list[float]]:
    """Nats of each row's targets, one row and one token at a time; `first` is None: positions in order."""
    found = []
    for tokens, outputs, targets in zip(*rows, strict=True):
        order = np.arange(len(tokens))
        place = [sum(outputs[:i] == outputs[i]) + (first or 0) * int(outputs[i]) for i in order]
        place = order if first is None else np.array(place)
        visible = (order <= order[:, None]) & (mutual | outputs[:, None] | ~outputs)
        logits = plain.logits(tokens, place[:, None] - place, visible)
        nats = np.log(np.exp(logits).sum(-1)) - logits[order, targets]
        found.append([cost if target >= 0 else 0.0 for cost, target in zip(nats, targets, strict=True)])
    return found


def test_the_loss_and_its_gradient_are_the_plain_models(model, tmp_path):
    sj.save_hf(model, tmp_path)
    plain, rows, cost = PlainLlama(tmp_path), wait_k_rows(PAIRS, wait=2), jax.jit(grouped_nats)
    for first, mutual in ((0, False), (3, False), (None, True)):
        place = np.tile(np.arange(7, dtype=np.int32), (2, 1)) if first is None else group_positions(rows.outputs, first)
        want = expected(plain, rows, first, mutual)
        np.testing.assert_allclose(cost(model, rows, place, mutual), want, rtol=2e-3, atol=2e-3)
    slope = jax.jit(jax.grad(grouped_loss))(model, rows)
    name, step = "model.embed_tokens.weight", 1e-6
    way = np.random.default_rng(0).normal(size=plain.weights[name].shape)
    ends = []
    for sign in (1, -1):
        plain.weights[name] = plain.weights[name] + sign * step * way * (1 if sign == 1 else 2)
        costs = np.array(expected(plain, rows, 0, False))
        ends.append(costs.sum() / (rows.targets >= 0).sum())
    want = (ends[0] - ends[1]) / (2 * step)
    assert np.sum(np.asarray(slope.embedding[...], np.float64) * way) == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_other_models_are_refused():
    rows = wait_k_rows(PAIRS, wait=2)
    with pytest.raises(ValueError, match="layer 0 has no full attention at rotated positions"):
        grouped_loss(build(LOCAL), rows)
