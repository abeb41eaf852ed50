"""Sampling against the definitions, against transformers' processors, and by the frequencies that it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.sampling import first_largest

VOCAB = 50
LOGITS = np.random.default_rng(0).normal(scale=3.0, size=(4, VOCAB)).astype(np.float32)
PROMPT = np.random.default_rng(1).integers(0, VOCAB, (4, 12))
SAMPLERS = [
    sj.Sampler(temperature=0.7),
    sj.Sampler(temperature=1.9, top_k=5),
    sj.Sampler(top_k=1),
    sj.Sampler(top_k=VOCAB + 9),
    sj.Sampler(top_p=0.6),
    sj.Sampler(top_p=0.05),
    sj.Sampler(top_p=0.999, temperature=3.0),
    sj.Sampler(min_p=0.2),
    sj.Sampler(min_p=1.0),
    sj.Sampler(repetition_penalty=1.7),
    sj.Sampler(repetition_penalty=0.6, temperature=0.8),
    sj.Sampler(repetition_penalty=1.3, temperature=0.9, top_k=20, top_p=0.9, min_p=0.03),
]


def seen_tokens() -> jax.Array:
    seen = np.zeros((len(LOGITS), VOCAB), bool)
    for row, prompt in enumerate(PROMPT):
        seen[row, prompt] = True
    return jnp.asarray(seen)


def filtered(sampler: sj.Sampler) -> np.ndarray:
    return np.asarray(sampler.filter(jnp.asarray(LOGITS), seen_tokens()))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_filters_are_those_of_transformers(sampler):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    chain = []
    if sampler.repetition_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty))
    chain.append(processors.TemperatureLogitsWarper(float(sampler.temperature)))
    if sampler.top_k:
        chain.append(processors.TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1:
        chain.append(processors.TopPLogitsWarper(sampler.top_p))
    if sampler.min_p:
        chain.append(processors.MinPLogitsWarper(sampler.min_p))
    scores = torch.tensor(LOGITS)
    for processor in chain:
        scores = processor(torch.tensor(PROMPT), scores)
    np.testing.assert_allclose(filtered(sampler), scores.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_filters_by_their_definitions():
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    ranks = (-LOGITS).argsort(-1).argsort(-1)
    np.testing.assert_array_equal(np.isfinite(filtered(sj.Sampler(top_k=7))), ranks < 7)
    np.testing.assert_array_equal(
        np.isfinite(filtered(sj.Sampler(min_p=0.1))), probability >= 0.1 * probability.max(-1, keepdims=True)
    )
    for row, kept in enumerate(np.isfinite(filtered(sj.Sampler(top_p=0.8)))):
        best = (-LOGITS[row]).argsort()
        enough = next(n for n in range(1, VOCAB + 1) if probability[row, best[:n]].sum() >= 0.8)
        assert set(np.flatnonzero(kept)) == set(best[:enough])


@pytest.mark.quick
def test_greedy_takes_the_best_after_the_penalty():
    greedy = sj.Sampler(temperature=0, top_k=3)
    np.testing.assert_array_equal(greedy.sample(jnp.asarray(LOGITS), None), LOGITS.argmax(-1))
    seen = np.zeros(LOGITS.shape, bool)
    seen[np.arange(4), LOGITS.argmax(-1)] = True
    strong = sj.Sampler(temperature=0, repetition_penalty=100.0)
    second = LOGITS.argsort(-1)[:, -2]
    np.testing.assert_array_equal(strong.sample(jnp.asarray(LOGITS), None, jnp.asarray(seen)), second)


@pytest.mark.quick
@pytest.mark.parametrize("sampler", [sj.Sampler(), sj.Sampler(temperature=0.5, top_k=6, min_p=0.02)], ids=str)
def test_draws_have_the_filtered_distribution(sampler):
    """Chi-square of 20,000 draws a row; 5 standard deviations over its mean would be one failure in millions."""
    draws = 20_000
    logits = jnp.asarray(LOGITS[:, :12] * 0.4)
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = np.asarray(jax.jit(jax.vmap(lambda key: sampler.sample(logits, key)))(keys))
    expected = np.asarray(jax.nn.softmax(sampler.filter(logits), axis=-1), np.float64)
    for row in range(len(LOGITS)):
        counts = np.bincount(tokens[:, row], minlength=12)
        kept = expected[row] > 0
        assert counts[~kept].sum() == 0
        freedom = kept.sum() - 1
        chi2 = ((counts[kept] - draws * expected[row, kept]) ** 2 / (draws * expected[row, kept])).sum()
        assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 0.0}, "Sampler.repetition_penalty is .*: it must be a number above 0"),
        ({"temperature": -0.1}, "Sampler.temperature is .*: it must be a number of at least 0"),
        ({"top_k": -1}, "Sampler.top_k is -1: it must be a whole number of at least 0"),
        ({"top_p": 0.0}, "Sampler.top_p is .*: it must be a number above 0 and at most 1"),
        ({"top_p": 1.1}, "Sampler.top_p is .*: it must be a number above 0 and at most 1"),
        ({"min_p": -0.1}, "Sampler.min_p is .*: it must be a number from 0 to 1"),
        ({"min_p": 1.1}, "Sampler.min_p is .*: it must be a number from 0 to 1"),
        ({"temperature": float("nan")}, "Sampler.temperature is .*: it must be a number of at least 0"),
        ({"repetition_penalty": float("nan")}, "Sampler.repetition_penalty is .*: it must be a number above 0"),
    ],
)
def test_impossible_samplers(options, message):
    with pytest.raises(ValueError, match=message) as error:
        sj.Sampler(**options)
    assert "\n" not in str(error.value)


@pytest.mark.quick
def test_sampling_says_what_it_lacks():
    logits = jnp.asarray(LOGITS)
    with pytest.raises(ValueError, match="needs a PRNG key"):
        sj.Sampler().sample(logits, None)
    with pytest.raises(ValueError, match="needs the tokens seen"):
        sj.Sampler(repetition_penalty=2.0).sample(logits, jax.random.key(0))


def test_the_first_largest_is_argmax():
    """Ties go to the first; of rows with NaN or without a finite logit an index of the row is given."""
    logits = np.random.default_rng(0).integers(0, 5, (40, 300)).astype(np.float32)
    logits[3] = -np.inf
    np.testing.assert_array_equal(first_largest(jnp.asarray(logits)), logits.argmax(axis=1))
    logits[:, 7] = np.nan
    found = np.asarray(first_largest(jnp.asarray(logits)))
    assert found.min() >= 0
    assert found.max() < 300
