"""What a chunk costs through tiers that choose what they read, beside a dense cache: work counted in its program.

A loop counts as often as it turns where that is fixed, and once where it is not; sizes here make it turn once. Of a
branch the dearest way counts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.kv import (
    BestKey,
    BlendedBounds,
    Cascade,
    Coarse,
    ContentPages,
    Full,
    KeyChange,
    Mean,
    Middle,
    Pages,
    Representative,
    Shadow,
    Sink,
    Window,
)
from streamjax.kv.channels import shadow
from streamjax.kv.pages import union_reading
from streamjax.kv.query import KVSpec, KVTokens, Query

HEADS, GROUP, WIDTH, CHUNK, HELD = 2, 2, 16, 128, 512
READ = {
    "quest": (Sink(4), Window(64), Pages(16, HELD, 16)),
    "topk_attention": (Window(16), Pages(8, HELD, 16, BestKey())),
    "mpcache": (Pages(16, HELD, 8, BlendedBounds(0.6), coarse=Coarse(6)),),
    "hip": (Window(64), Pages(16, HELD, 16, Middle(), 32, search="tree")),
    "dhsa": (Window(64), ContentPages(16, HELD, 16, KeyChange(0.5, 8, 4), Mean(power=0.5))),
    "shadow_kv": (Window(32), Shadow(HELD, 0.25, group=64, page=8, top_k=16, outliers=4)),
    "inf_llm": (
        Sink(8, reach=512),
        Window(HELD),
        Pages(32, 64, 2, Representative(4), CHUNK, distance=HELD, pool="mean", shared=True, read_newest=True),
    ),
}


def equations(jaxpr, times=1):
    """Every equation that runs, and how often."""
    found = []
    for eqn in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)]
        inner = [x for x in inner if hasattr(x, "eqns")]
        if eqn.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: products(equations(branch)))]
        often = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        found += [(eqn, times)] + [pair for each in inner for pair in equations(each, often)]
    return found


def is_program(x):
    return hasattr(x, "eqns")


def products(pairs):
    """Multiplications of all products."""
    total = 0
    for eqn, times in pairs:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += (
                times
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            )
    return total


def chunk(*tiers):
    """All equations of a chunk that attends and is stored."""
    cache = Cascade(*tiers)
    spec = KVSpec(1, HEADS, WIDTH, jnp.dtype(jnp.float32), GROUP)

    def update(state, q, k):
        place = jnp.full((1,), 2 * HELD, jnp.int32)
        position = 2 * HELD + jnp.arange(CHUNK, dtype=jnp.uint32)[None]
        tokens = KVTokens(k, k, k, position[:, None], jnp.ones((1, 1, CHUNK), bool))
        return cache.update(state, Query(q, q, position, place, None, None, 0.25, None), tokens)

    q, k = jnp.zeros((1, CHUNK, HEADS * GROUP, WIDTH)), jnp.zeros((1, HEADS, CHUNK, WIDTH))
    return equations(jax.make_jaxpr(update)(cache.init(spec), q, k).jaxpr)


@pytest.fixture(scope="module")
def dense():
    return products(chunk(Full(HELD)))


@pytest.mark.parametrize("name", READ)
def test_a_chunk_that_reads_everything_takes_at_most_half_more_products_than_dense_attention(dense, name):
    """Choosing, and attention that is noted, included; a window that computes logits twice takes half more alone."""
    assert products(chunk(*READ[name])) <= 1.5 * dense


@pytest.mark.parametrize("name", [name for name in READ if name not in ("hip", "inf_llm")])
def test_no_pages_are_sorted_for_each_query(name):
    """Where every query chooses for itself: a sort of the scores of 128 pages takes ten times what counting takes."""
    sorted_ = [math.prod(eqn.invars[0].aval.shape) for eqn, _ in chunk(*READ[name]) if eqn.primitive.name in SORTS]
    assert max(sorted_, default=0) < CHUNK * HEADS * 2


SORTS = ("sort", "top_k", "approx_top_k")


def counted(monkeypatch, module, name, size):
    """A list that grows by `size(arguments)` each time when a program runs `module.name`."""
    found, plain = [], getattr(module, name)

    def counting(*arguments):
        jax.debug.callback(lambda: found.append(size(*arguments)))
        return plain(*arguments)

    monkeypatch.setattr(module, name, counting)
    return found


def attend(tier, fill):
    """64 random queries attend to a tier whose state is what `fill` makes of an empty one and a source of numbers."""
    spec, rng = KVSpec(1, HEADS, WIDTH, jnp.dtype(jnp.float32), GROUP), np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 64, HEADS * GROUP, WIDTH)), jnp.float32)
    position = HELD + jnp.arange(64, dtype=jnp.uint32)[None]
    query = Query(q, q, position, jnp.full((1,), HELD, jnp.int32), None, None, 0.25, None)
    jax.block_until_ready(jax.jit(lambda state: tier.attend(state, query, None))(fill(tier.init(spec), rng)))
    jax.effects_barrier()


def test_neighbours_of_shadow_kv_gather_what_they_chose_and_no_more(monkeypatch):
    """Four blocks of 16 queries read 8 of 64 pages each; a dense cache would read all 64 for each."""
    monkeypatch.setattr(union_reading, "SLOTS", 64)
    gathered = counted(monkeypatch, shadow, "gather_pages", lambda pages, chosen: chosen.shape[2])

    def fill(state, rng):
        slots = dataclasses.replace(state.slots, filled=jnp.full((1,), HELD, jnp.int32))
        landmarks = jnp.asarray(rng.normal(size=state.landmarks.shape), jnp.float32)
        return dataclasses.replace(state, slots=slots, landmarks=landmarks)

    attend(Shadow(HELD, 0.25, group=64, page=8, top_k=8, outliers=0, block=16), fill)
    assert gathered == [8] * 4


def test_topk_attention_compares_queries_with_the_keys_that_are_held(monkeypatch):
    """300 of 4,096 slots hold tokens: two runs of 256 keys, once for each query."""
    scored = counted(monkeypatch, BestKey, "scores", lambda _, summary, __: math.prod(summary[0].shape[2:4]))
    filled = jnp.full((1,), 300, jnp.int32)
    attend(
        Pages(8, 4096, 16, BestKey()),
        lambda state, _: dataclasses.replace(
            state, tokens=dataclasses.replace(state.tokens, filled=filled, cursor=filled)
        ),
    )
    assert scored == [256] * 2
