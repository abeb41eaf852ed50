"""Rules of rows against `Sampler`: the same tokens stay, ties included, each row by its own rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.serving.requests import Sampling
from streamjax.serving.row_sampling import RowSampling, choose, keep_likely, one_row, ordered_bits
from tests.serving.engines import request

V, ROWS = 24, 3
RULES = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, V, 1000]),
    top_p=st.sampled_from([0.1, 0.6, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    seed=st.integers(0, 2**31 - 1),
)
filtered = jax.jit(keep_likely)
chosen = jax.jit(choose)


def rows(rules: list[Sampling], generated: list[int]) -> RowSampling:
    each = [one_row(request([1], 99, rule), generated, V) for rule in rules]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def sampler(rule: Sampling) -> sj.Sampler:
    return sj.Sampler(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(sj.Sampler)})


@settings(max_examples=8)
@given(st.lists(RULES, min_size=ROWS, max_size=ROWS), st.integers(0, 99), st.booleans())
def test_what_stays_is_what_a_sampler_keeps(rules, seed, ties):
    logits = np.random.default_rng(seed).normal(scale=3, size=(ROWS, V)).astype(np.float32)
    logits = np.round(logits) if ties else logits
    drawn = np.array([rule.temperature > 0 for rule in rules])
    kept = np.isfinite(np.asarray(filtered(jnp.asarray(logits), rows(rules, []), jnp.asarray(drawn))))
    for row, rule in enumerate(rules):
        if drawn[row]:
            plain = dataclasses.replace(sampler(rule), repetition_penalty=1.0)
            assert (kept[row] == np.isfinite(plain.filter(jnp.asarray(logits[row : row + 1])))[0]).all()


@settings(max_examples=8)
@given(st.lists(RULES, min_size=ROWS, max_size=ROWS), st.integers(0, 99))
def test_a_token_is_the_one_that_a_sampler_draws(rules, seed):
    draw = np.random.default_rng(seed)
    logits = jnp.asarray(draw.normal(scale=3, size=(ROWS, V)).astype(np.float32))
    used = jnp.asarray(draw.integers(0, 2, (ROWS, V)).astype(bool))
    generated = [3, 4, 3]
    found = chosen(logits, rows(rules, generated), used, jnp.ones(ROWS, bool)).token
    for row, rule in enumerate(rules):
        key = jax.random.fold_in(jax.random.key(rule.seed), len(generated))
        assert found[row] == sampler(rule).sample(logits[row : row + 1], key, used[row : row + 1])[0]


def test_bits_are_in_the_order_of_floats():
    values = np.array([-np.inf, -3e38, -1.5, -1e-40, 0.0, 1e-40, 2.0, 3e38, np.inf], np.float32)
    assert (np.diff(np.asarray(ordered_bits(jnp.asarray(values[None])))[0].astype(np.int64)) > 0).all()
