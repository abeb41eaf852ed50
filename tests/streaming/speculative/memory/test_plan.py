"""Guesses within a budget: the most that fit, what they take against live buffers, and one line where nothing fits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative import Hydra, ParallelPrompts
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from streamjax.streaming.speculative.memory import fit_draft, fitted
from tests.streaming.speculative.test_hydra import random_heads
from tests.streaming.speculative.test_parallel_prompts import IDS
from tests.streaming.tiny_models import GQA, LOCAL, build


def work(drafter):
    return 8000 * drafter.pass_width  # of which the plan makes 9000


def test_the_most_guesses_that_fit():
    model = build(LOCAL)
    heads = Hydra(model=model, heads=random_heads(model), length=3, width=3, size=6)
    before = {id(x) for x in jax.live_arrays()}
    again = Hydra(model=model, heads=random_heads(model), length=3, width=3, size=6)
    own = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    weights, state = again.held_bytes(4, model)
    assert (weights, state) == (own, 0)
    for fits in range(1, 7):
        draft, memory = fitted(heads, model, 4, weights + 9000 * (1 + fits) + 500, work)
        assert (draft.nodes, memory.guesses, memory.tokens) == (fits, fits, 1 + fits)
        assert memory.total == weights + 9000 * (1 + fits)
        assert draft.length <= fits
        assert heads.nodes == 6
    with pytest.raises(ValueError, match=r"is too little for guesses: 1 guess for each of 4 rows: .*; of rows 3 "):
        fitted(heads, model, 4, weights + 17_999, work)


def test_prompt_tokens_and_small_models_keep_something_of_each_stream():
    model = build(GQA)
    prompts = PromptTokens(
        np.asarray(model.embed(jnp.asarray(IDS[None, :2])))[0], IDS, fingerprint_in_any_dtype(model), 3
    )
    draft = ParallelPrompts(model=model, heads=prompts)
    assert draft.held_bytes(5, model)[1] == 5 * 2 * 16 * 4
    less, memory = fitted(draft, model, 5, draft.held_bytes(5, model)[0] + 90_000, work)
    assert (less.nodes, less.length, less.prompts.shape[0]) == (2, 2, 2)
    assert memory.tokens == 9
    one, _ = fitted(draft, model, 5, draft.held_bytes(5, model)[0] + 40_000, work)
    assert (one.nodes, one.length, one.prompts.shape[0], one.trees.length) == (1, 1, 1, 1)
    cache = sj.kv.preset("streaming_llm", sinks=2, window=9)
    small = sj.SmallModel(model=model, cache=cache)
    state = sj.init_state(model, cache, 3, note_used=True)
    assert small.held_bytes(3, model) == (0, 2 * sum(x.nbytes for x in jax.tree.leaves(state)))
    assert small.held_bytes(3, build(GQA, seed=1))[0] == sum(x.nbytes for x in jax.tree.leaves(model))
    assert sj.kv.describe(cache, model).total <= small.held_bytes(1, model)[1] / 2


def test_streams_and_the_engine_count_their_own_passes():
    model, cache = build(GQA), sj.kv.preset("dense", capacity=64)
    draft, memory = fit_draft(sj.NGrams(length=7), model, cache, 10**9)
    assert (draft.length, memory.guesses, memory.weights) == (7, 7, 0)
    least = fit_draft(sj.NGrams(length=1), model, cache, 10**9)[1].total
    between = (least + memory.total) // 2
    draft, found = fit_draft(sj.NGrams(length=7), model, cache, between)
    assert 1 <= draft.length < 7
    assert found.total <= between < fit_draft(sj.NGrams(length=draft.length + 1), model, cache, 10**9)[1].total
    with pytest.raises(ValueError, match=re.escape("100 bytes is too little for guesses: 1 guess for a stream: ")):
        fit_draft(sj.NGrams(length=7), model, cache, 100)
