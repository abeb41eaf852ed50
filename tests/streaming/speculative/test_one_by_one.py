"""Guesses that are read in one pass see what they would see if they were read one after another, in every cache.

Most caches of a long stream change under a chunk: a window drops a token into pages, of which a query reads some; a
group of tokens becomes codes. Plain steps over single tokens are the oracle, in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative import ParallelPrompts
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from streamjax.streaming.speculative.two_phases import harmless, look_ahead, take_in_first
from streamjax.streaming.step import advance
from tests.streaming.speculative.test_two_phases import CACHES, MODELS
from tests.streaming.tiny_models import GQA, build, random_tokens

WIDTH = 5  # no divisor of any group or page: what changes does so within a pass at times
SMALL = {"inf_llm": {"window": 32}, "cskv": {"group": 32, "window": 32}}
BYTES = {"cskv": 4e5, "inf_llm": 3e5, "mpcache": 3e5, "shadow_kv": 6e5}
UNSIZED = ("hsa", "long_mem", "minicache", "xkv")


@jax.jit
def single(model, state, token, count):
    return advance(model, state, token, count)


@jax.jit
def in_one_pass(model, state, tokens, given, count):
    hidden, waiting = look_ahead(model, state, tokens, given)
    return hidden, take_in_first(model, state, waiting, hidden, tokens, count)


def check(model, caches, prompt=0, rounds=8, rows=2):
    """Passes of which some tokens count, beside a stream that reads all of these by themselves; rows differ in length.

    What the passes have stored shows in what later passes see.
    """
    draw, vocab = np.random.default_rng(0), model.config.vocab_size
    state = sj.init_state(model, caches, rows)
    for begin in range(0, prompt, 32):
        count = jnp.array([32, *[29] * (rows - 1)], jnp.int32)
        state = jax.jit(advance)(model, state, random_tokens(rows, 32, seed=100 + begin) % vocab, count)[0]
    plain = state
    for i in range(rounds):
        tokens = jnp.asarray(random_tokens(rows, WIDTH, seed=i) % vocab)
        given = np.asarray(harmless(model, state, jnp.full((rows,), WIDTH, jnp.int32)))
        count = np.minimum(draw.integers(1, WIDTH + 1, rows), given)
        hidden, state = in_one_pass(model, state, tokens, jnp.asarray(given), jnp.asarray(count, jnp.int32))
        ahead, steps = plain, []
        for j in range(WIDTH):
            ahead, one = single(model, ahead, tokens[:, j : j + 1], jnp.ones((rows,), jnp.int32))
            plain, _ = single(model, plain, tokens[:, j : j + 1], jnp.asarray(j < count, jnp.int32))
            steps.append(one)
        for row, right in enumerate(np.asarray(jnp.concatenate(steps, axis=1))):
            found = np.asarray(hidden)[row, : given[row]]
            np.testing.assert_allclose(
                found, right[: given[row]], atol=5e-4, rtol=5e-4, err_msg=f"pass {i}, stream {row}"
            )
    np.testing.assert_array_equal(state.seen, plain.seen)


USUAL = ("coded",)


@pytest.mark.usual(*USUAL)
@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in CACHES])
def test_guesses_are_seen_one_by_one(name):
    check(build(GQA.replace(num_layers=1, head_dim=8)), CACHES[name], rounds=14)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, e in sj.kv.presets().items() if n not in UNSIZED and not e.needs])
def test_guesses_are_seen_one_by_one_under_every_preset(name, tmp_path):
    """Behind a prompt that is longer than what is held, where that has an end."""
    model = build(GQA.replace(num_layers=2, head_dim=16))
    gates = tmp_path / "gates.json"
    gates.write_text('{"gates": [[0.9, 0.1], [0.2, 0.8]]}')
    options = {"heads": str(gates)} if "heads" in sj.kv.presets()[name].options else {}
    cache = sj.kv.sized(name, model, BYTES.get(name, 2e5), **options, **SMALL.get(name, {}))
    if isinstance(cache, sj.kv.Budgeted) and cache.unmeasured:
        cache = cache.cascade
    caches = sj.init_state(model, cache).caches
    ends = min(x.capacity or 10**6 for x in caches)
    held = max(min(x.slots, ends - 60) for x in caches)
    check(model, cache, prompt=min(-(-held // 32) * 32, 640, (ends - 60) // 32 * 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_guesses_are_seen_one_by_one_in_every_kind_of_layer(name):
    """Beside recurrent states, latent keys, a memory that an encoder makes, under pages where it has attention."""
    cache = "quest:sinks=2,window=4,capacity=32,page=4,top_k=3"
    if name == "chunk memory":
        cache = "hsa:capacity=8"
    kind, options = sj.kv.parse_preset(cache)
    check(build(MODELS[name]), sj.kv.preset(kind, **options), rounds=10)


@pytest.mark.quick
def test_a_drafter_that_needs_trees_is_refused_where_caches_change_with_every_token():
    model = build(GQA.replace(num_layers=1, head_dim=8))
    prompts = PromptTokens(
        np.asarray(model.embed(jnp.array([[7, 30]])))[0],
        np.arange(1, 9, dtype=np.int32),
        fingerprint_in_any_dtype(model),
        3,
    )
    draft = ParallelPrompts(model=model, heads=prompts)
    state, greedy = sj.init_state(model, CACHES["pages"], 1), sj.Sampler(temperature=0)
    with pytest.raises(ValueError, match="prompt tokens are read as trees, which this model or its cache does not"):
        sj.generate(model, state, random_tokens(1, 4), max_new_tokens=4, sampler=greedy, draft=draft)
