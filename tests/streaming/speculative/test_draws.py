"""Sampled tokens: each place's own random numbers, and draws that are counted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.speculative import Drafter, Drafts
from streamjax.streaming.speculative.choosing import choose, seen_at
from tests.covering import rest_slow
from tests.streaming.tiny_models import GQA, VOCAB, build, random_tokens


@pytest.mark.quick
def test_places_are_chosen_as_one_after_another():
    """Rows whose next draws have numbers of their own, after what each place has seen."""
    sampler, key = sj.Sampler(temperature=1.3, top_k=11, repetition_penalty=1.7), jax.random.key(8)
    logits = jax.random.normal(jax.random.key(0), (3, 4, VOCAB)) * 3
    used, tokens = jnp.arange(VOCAB) < jnp.array([[5], [0], [9]]), jnp.asarray(random_tokens(3, 4))
    index = jnp.array([7, 0, 30], jnp.int32)
    found = np.asarray(jax.jit(lambda: choose(sampler, logits, key, index, seen_at(used, tokens)))())
    sample = jax.jit(lambda place, index, seen: sampler.sample(logits[:, place], jax.random.fold_in(key, index), seen))
    for row in range(3):
        seen = np.array(used)
        for place in range(4):
            seen[row, tokens[row, place]] = True
            drawn = sample(place, int(index[row]) + place, seen)
            assert int(found[row, place]) == int(drawn[row])


@dataclasses.dataclass
class Stubborn(Drafter):
    """Always guesses the same."""

    length: int = 2
    token: int = 0

    def propose(self, streams, wanted, draws):
        tokens = np.full((len(streams), self.length), self.token, np.int32)
        return Drafts(tokens, np.where(wanted, self.length, 0).astype(np.int32))


@dataclasses.dataclass
class Undecided(Stubborn):
    """Guesses either of two tokens, and behind the second one of them the same again."""

    other: int = 0

    @property
    def nodes(self):
        return 4

    def propose(self, streams, wanted, draws):
        tokens = np.tile(np.array([self.other, self.token, self.token, self.other], np.int32), (len(streams), 1))
        parents = np.tile(np.array([0, 0, 2, 2], np.int32), (len(streams), 1))
        return Drafts(tokens, np.where(wanted, 4, 0).astype(np.int32), parents)


@functools.partial(jax.jit, static_argnames="sampler")
def probabilities(logits, sampler):
    """Of each next token, behind all but the last of the tokens of B rows, and behind all."""
    return tuple(jax.nn.softmax(sampler.filter(logits[:, place])) for place in (-2, -1))


@pytest.mark.parametrize("rows", rest_slow([160, 512], 160))
@pytest.mark.parametrize("kind", [Stubborn, pytest.param(Undecided, marks=pytest.mark.slow)])
def test_counted_draws_have_the_models_distribution(rows, kind):
    """Three tokens of many streams, of which a guess is often right and often wrong: chi-square of pairs."""
    model, sampler = build(GQA.replace(num_layers=1)), sj.Sampler(temperature=1.5, top_k=4)
    prompt = random_tokens(1, 6)
    longer = np.concatenate((np.repeat(prompt, VOCAB, axis=0), np.arange(VOCAB, dtype=np.int32)[:, None]), axis=1)
    first, second = map(np.asarray, probabilities(sj.forward(model, longer), sampler))
    probable = first[:1].T * second
    second_best, guess = (int(token) for token in np.argsort(probable.sum(axis=0))[-2:])
    draft = Stubborn(token=guess) if kind is Stubborn else Undecided(token=guess, other=second_best)
    state = sj.init_state(model, sj.kv.preset("dense", capacity=9), rows)
    _, tokens = sj.generate(
        model, state, np.repeat(prompt, rows, axis=0), max_new_tokens=3, sampler=sampler, key=jax.random.key(1),
        draft=draft,
    )  # fmt: skip
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(np.asarray(tokens)[:, :2].T), 1)
    assert not counts[probable == 0].any()
    expected, counts = rows * probable[probable > 0], counts[probable > 0]
    often = expected > 4
    expected, counts = (
        np.append(expected[often], expected[~often].sum()),
        np.append(counts[often], counts[~often].sum()),
    )
    worst = len(expected) + 4 * np.sqrt(2 * len(expected))
    assert np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9)) < worst
    assert 0 < np.mean(np.asarray(tokens)[:, 1] == guess) < 1
