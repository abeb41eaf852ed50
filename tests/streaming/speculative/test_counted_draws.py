"""Sampled tokens in several kinds of cache and of layer: draws behind guesses are counted against plain steps.

Three tokens of many streams, of which a guess is often right and often wrong, behind a prompt that is longer than small
caches hold. Their distribution is multiplied from logits of `sj.step` along every path, without guesses: chi-square.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.speculative import Drafter, Drafts, decoding
from streamjax.streaming.speculative.choosing import choose
from streamjax.streaming.speculative.verification import verify
from tests.streaming.speculative.test_two_phases import CACHES, MODELS
from tests.streaming.tiny_models import GQA, build, random_tokens

ROWS, BATCHES, PROMPT, TOP = 64, 24, 26, 4
SAMPLER = sj.Sampler(temperature=1.5, top_k=TOP)
ONE = GQA.replace(num_layers=1, head_dim=8)
KINDS = {
    **{
        name: (ONE, CACHES[name])
        for name in ("dense", "sinks and window", "sinks, windows", "scored", "coded", "pages")
    },
    "int8": (ONE, sj.kv.preset("kivi", bits=8, group=8, residual=8, capacity=80)),
    "qwen3_next": (MODELS["qwen3_next"], sj.kv.preset("streaming_llm", sinks=2, window=7)),
}


@dataclasses.dataclass
class Stubborn(Drafter):
    """Guesses the same token twice, and counts how often it was asked."""

    length: int = 2
    token: int = 0
    asked: int = 0

    def propose(self, streams, wanted, draws):
        self.asked += int(np.sum(wanted))
        return Drafts(
            np.full((len(streams), self.length), self.token, np.int32),
            np.where(wanted, self.length, 0).astype(np.int32),
        )


@jax.jit
def chances(logits):
    """Of each next token, behind the last place."""
    return jax.nn.softmax(SAMPLER.filter(logits[:, -1].astype(jnp.float32)))


def paths(model, cache, prompt):
    """All ways to go on by three tokens, [P, 3], how likely each is, [P], and the likeliest second token, the guess."""
    rows = np.arange(TOP * TOP)
    state = sj.init_state(model, cache, len(rows))
    state, _ = sj.generate(
        model, state, np.repeat(prompt, len(rows), axis=0), max_new_tokens=0, sampler=SAMPLER, key=jax.random.key(0)
    )
    found = np.asarray(chances(jax.jit(lambda: model.logits(state.hidden[:, None]))()), np.float64)
    first = np.argsort(-found, axis=1)[rows, rows // TOP].astype(np.int32)
    chance = found[rows, first]
    state, logits = sj.step(model, state, first[:, None])
    found = np.asarray(chances(logits), np.float64)
    second = np.argsort(-found, axis=1)[rows, rows % TOP].astype(np.int32)
    chance *= found[rows, second]
    guess = int(np.argmax(np.bincount(second, weights=chance)))
    _, logits = sj.step(model, state, second[:, None])
    found = np.asarray(chances(logits), np.float64)
    row, third = np.nonzero(found)
    return np.stack((first[row], second[row], third), axis=1), chance[row] * found[row, third], guess


def distance(tokens, ways, chance):
    """Chi-square of counted paths over what chance allows: above 1 it is no chance, but in one of 30,000 cases."""
    known = {tuple(way): place for place, way in enumerate(ways.tolist())}
    counts = np.zeros(len(ways))
    for way in tokens.tolist():
        if tuple(way) not in known:
            return np.inf
        counts[known[tuple(way)]] += 1
    expected = len(tokens) * chance
    often = expected > 5
    expected, counts = (np.append(x[often], x[~often].sum()) for x in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    return np.sum((counts - expected) ** 2 / expected) / (len(expected) + 4 * np.sqrt(2 * len(expected)))


def drawn(model, cache, prompt, draft):
    """Three tokens of so many streams, with guesses. [N, 3]"""
    found = []
    for batch in range(BATCHES):
        state = sj.init_state(model, cache, ROWS)
        prompts = np.repeat(prompt, ROWS, axis=0)
        _, tokens = sj.generate(
            model, state, prompts, max_new_tokens=4, sampler=SAMPLER, key=jax.random.key(batch), draft=draft
        )
        found.append(np.asarray(tokens)[:, :3])
    return np.concatenate(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_counted_draws_behind_guesses(name):
    config, cache = KINDS[name]
    model, prompt = build(config), random_tokens(1, PROMPT) % config.vocab_size
    ways, chance, guess = paths(model, cache, prompt)
    assert np.sum(chance) == pytest.approx(1, abs=1e-5)
    draft = Stubborn(token=guess)
    tokens = drawn(model, cache, prompt, draft)
    assert draft.asked >= len(tokens)
    assert 0.05 < np.mean(tokens[:, 1] == draft.token) < 0.95
    assert distance(tokens, ways, chance) < 1


def accept_always(tokens, chosen, again):
    return jnp.concatenate((tokens[:, 1:], chosen[:, -1:]), axis=1)


def draw_again(tokens, chosen, again):
    """Behind a guess that is refused from the whole distribution, of which the guess is not taken away."""
    guess = jnp.concatenate((tokens[:, 1:], jnp.full_like(tokens[:, :1], -1)), axis=1)
    return jnp.where(chosen == guess, chosen, again)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [accept_always, draw_again])
@pytest.mark.parametrize("name", ["sinks and window"])
def test_a_wrong_rule_of_acceptance_is_counted(name, rule, monkeypatch):
    """The test above would see it: these are faults that are put in by hand."""

    def wrong_pass(model, state, tokens, given, key, index, sampler, stop):
        def choice(logits, seen):
            return rule(tokens, choose(sampler, logits, key, index), choose(sampler, logits, key, index + 1000))

        return verify(model, state, tokens, given, choice, stop)

    wrong = jax.jit(wrong_pass, static_argnames=("sampler", "stop"), donate_argnames="state")
    monkeypatch.setattr(decoding, "verify_pass", wrong)
    config, cache = KINDS[name]
    model, prompt = build(config), random_tokens(1, PROMPT) % config.vocab_size
    ways, chance, guess = paths(model, cache, prompt)
    tokens = drawn(model, cache, prompt, Stubborn(token=guess))
    assert distance(tokens, ways, chance) > 2
