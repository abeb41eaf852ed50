"""Prompt tokens learn what a model says later: what they see, the loss of each place, and a gradient that helps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary
from streamjax.training.heads.drafting import DraftHeadsConfig
from streamjax.training.heads.prompting import _empty, prompt_loss, train_prompt_tokens
from streamjax.training.heads.text_rows import text_rows
from tests.architectures import tiny_config
from tests.streaming.tiny_models import GQA, VOCAB, build, random_tokens

IDS = np.arange(VOCAB, dtype=np.int32)


@pytest.mark.slow
def test_the_loss_of_each_place():
    """Prompts that are tokens of the model: what it says at them is what it says of a row that has them."""
    model, tokens, places = build(GQA), random_tokens(1, 9), [2, 5]
    vocabulary, mine = DraftVocabulary.from_model(model, jnp.asarray(IDS)), [7, 30]
    prompts = model.embed(jnp.array([mine]))[0]
    loss, right = jax.jit(prompt_loss)(
        prompts, model, vocabulary, _empty(model, 1, 11), jnp.asarray(tokens), jnp.array([places], jnp.int32)
    )
    said = np.asarray(jax.nn.log_softmax(sj.forward(model, tokens)[0]), np.float64)
    losses, hits = np.zeros((2, 2)), np.zeros((2, 2))
    for row, t in enumerate(places):
        branch = np.concatenate((tokens[0, : t + 1], mine)).astype(np.int32)[None]
        found = np.asarray(jax.nn.log_softmax(sj.forward(model, branch)[0]), np.float64)
        for k in (1, 2):
            losses[row, k - 1] = -np.sum(np.exp(said[t + k]) * found[t + k])
            hits[row, k - 1] = np.argmax(said[t + k]) == np.argmax(found[t + k])
    np.testing.assert_allclose(loss, losses.mean(0) @ [1, 0.8] / 1.8, rtol=1e-4)
    np.testing.assert_allclose(right, hits.mean(0))


@pytest.mark.slow
def test_prompts_come_to_know_a_model():
    text = random_tokens(30, seed=3)
    config = DraftHeadsConfig(heads=2, steps=40, learning_rate=0.1)
    steps = list(train_prompt_tokens(build(GQA), IDS, text_rows(text, 20, 2), config, places=8))
    losses = [step.loss for step in steps]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_recurrent_layers_are_refused():
    model = build(tiny_config("mamba2"))
    with pytest.raises(ValueError, match="--kind=hydra"):
        next(train_prompt_tokens(model, IDS, iter([random_tokens(1, 9)]), DraftHeadsConfig()))
