"""Attention inside chosen pages: kernels in interpreters against float64, all gradients; the reference; the tiles."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, reference
from pallas_kernels.choice_tiles import most_tiles, stable_order, tiles
from pallas_kernels.tpu import hsa_attention as tpu_hsa
from tests.covering import on_each, rest_slow
from tests.kernels.tolerances import RACES, TOLERANCE

INTERPRETERS = {"tpu": RACES, "triton": True}


def drawn_choices(random, batch, heads, queries, pages, most, idle=()):
    """Different pages for each query in any order, some fewer than `most`, none of them in `idle`; and weights."""
    pool = np.setdiff1d(np.arange(pages), idle)
    chosen = np.full((batch, heads, queries, most), -1)
    for at in np.ndindex(batch, heads, queries):
        count = random.integers(0, min(most, len(pool)) + 1)
        chosen[at][random.permutation(most)[:count]] = random.permutation(pool)[:count]
    weights = random.uniform(0.1, 1.0, chosen.shape)
    weights[random.random(chosen.shape) < 0.1] = 0.0
    return chosen.astype(np.int32), weights.astype(np.float32)


def gradients(attention, d_out):
    """Output and gradients of q, k, v and the weights."""

    def run(q, k, v, chosen, weights):
        out, pull = jax.vjp(lambda q, k, v, weights: attention(q, k, v, chosen, weights), q, k, v, weights)
        return out, *pull(jnp.asarray(d_out, out.dtype))

    return run


@lru_cache(maxsize=1)  # each case is asked of one interpreter after the other
def in_float64(
    queries, pages, most, *, batch=1, heads=2, kv_heads=1, size=16, width=64, idle=(), dtype="float32", seed=0
):
    """Queries, keys, values, choices and weights, a slope of the output, the scale, and what the reference gives."""
    random = np.random.default_rng(seed)
    q = jnp.asarray(random.standard_normal((batch, queries, heads, width)), dtype)
    k, v = (jnp.asarray(random.standard_normal((batch, kv_heads, pages, size, width)), dtype) for _ in range(2))
    chosen, weights = drawn_choices(random, batch, kv_heads, queries, pages, most, idle)
    d_out = random.standard_normal(q.shape)
    scale = 1.3 / math.sqrt(width)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, weights)]
        run = jax.jit(gradients(partial(reference.hsa_attention, scale=scale), d_out))
        expected = [np.asarray(x) for x in run(*exact[:3], jnp.asarray(chosen), exact[3])]
    return (q, k, v, chosen, weights), d_out, scale, expected


def check(queries, pages, most, *, dtype="float32", block=None, implementation="tpu", **drawn):
    """The kernel gives what the reference gives; pages that nobody chose are NaN and have a gradient of 0."""
    (q, k, v, chosen, weights), d_out, scale, expected = in_float64(queries, pages, most, dtype=dtype, **drawn)
    read = (chosen[:, :, None] == np.arange(pages)[:, None, None]).any(axis=(-1, -2))
    k, v = (jnp.where(read[..., None, None], x, jnp.nan) for x in (k, v))
    kernel = partial(
        api.hsa_attention, scale=scale, block=block, implementation=implementation,
        interpret=INTERPRETERS[implementation],
    )  # fmt: skip
    found = jax.jit(gradients(kernel, d_out))(q, k, v, jnp.asarray(chosen), jnp.asarray(weights))
    assert [x.dtype.name for x in found] == ["float32", dtype, dtype, dtype, "float32"]
    for name, mine, right in zip(("out", "q", "k", "v", "weights"), found, expected, strict=True):
        error = np.max(np.abs(np.asarray(mine, np.float64) - right)) / max(np.max(np.abs(right)), 1e-30)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
    for x in found[2:4]:
        np.testing.assert_array_equal(np.asarray(x, np.float32)[~read], 0.0)
    np.testing.assert_array_equal(np.asarray(found[0])[(chosen < 0).all(axis=-1).all(axis=1)], 0.0)


@pytest.mark.parametrize(
    ("implementation", "queries", "pages", "most", "options"),
    on_each(
        INTERPRETERS,
        [
            pytest.param(
                11, 5, 3, {"idle": (0, 3), "heads": 6, "kv_heads": 2, "size": 8},
                id="unread-pages-three-heads-a-key-head",
            ),
            pytest.param(1, 6, 3, {"heads": 4, "kv_heads": 2, "seed": 3}, id="decode"),
            pytest.param(7, 4, 3, {"dtype": "bfloat16", "heads": 9, "width": 128}, id="bf16-mqa"),
            pytest.param(5, 3, 3, {"dtype": "bfloat16", "width": 96, "size": 64}, id="bf16-all-pages"),
            pytest.param(3, 3, 2, {"idle": (0, 1, 2)}, id="nothing-chosen"),
        ],
        weekly={"tpu": ("decode", "bf16-mqa", "nothing-chosen"), "triton": ("bf16-all-pages",)},
    ),
)  # fmt: skip
def test_matches_float64(queries, pages, most, options, implementation):
    check(queries, pages, most, block=16, **options, implementation=implementation)


@pytest.mark.slow
@settings(max_examples=2)
@given(data=st.data())
def test_drawn(data):
    kv_heads, dtype = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(sorted(TOLERANCE)))
    check(
        data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)),
        heads=kv_heads * data.draw(st.integers(1, 4)), kv_heads=kv_heads, dtype=dtype,
        size=data.draw(st.sampled_from([16, 32])), width=data.draw(st.sampled_from([64, 128])),
        block=data.draw(st.sampled_from([None, 32])), seed=data.draw(st.integers(0, 99)),
        implementation=data.draw(st.sampled_from(sorted(INTERPRETERS))),
    )  # fmt: skip


@pytest.mark.parametrize("limit", rest_slow(["RESIDENT", "TABLE"], "RESIDENT"))
def test_spans_of_queries_share_the_gradients_of_keys(monkeypatch, limit):
    """More queries, or more tiles, than a TPU keeps in fast memory: several calls; gradients of k and v add up."""
    monkeypatch.setattr(tpu_hsa, limit, 8)
    check(7, 4, 2, heads=2, kv_heads=1, block=16)


@pytest.mark.parametrize("group", rest_slow([1, 2], 2))
def test_the_reference_is_the_published_sum(group):
    """Token by token, head by head: a softmax inside each chosen page, outputs times the pages' weights."""
    random = np.random.default_rng(0)
    batch, queries, kv_heads, pages, size, width = 2, 5, 2, 4, 3, 4
    q = random.standard_normal((batch, queries, kv_heads * group, width))
    k, v = (random.standard_normal((batch, kv_heads, pages, size, width)) for _ in range(2))
    chosen, weights = drawn_choices(random, batch, kv_heads, queries, pages, 3)
    expected = np.zeros_like(q)
    for b, c, h in np.ndindex(*q.shape[:3]):
        for page, weight in zip(chosen[b, h // group, c], weights[b, h // group, c], strict=True):
            if page >= 0:
                inside = np.exp(0.7 * k[b, h // group, page] @ q[b, c, h])
                expected[b, c, h] += weight * (inside / inside.sum()) @ v[b, h // group, page]
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (q, k, v, chosen, weights.astype(np.float64)))
        np.testing.assert_allclose(reference.hsa_attention(*arrays, scale=0.7), expected, atol=1e-12)


@settings(max_examples=6)
@given(
    st.integers(0, 10**6), st.integers(1, 2), st.sampled_from([1, 30]), st.integers(1, 9), st.integers(1, 4),
    st.sampled_from([1, 3, 8]),
)  # fmt: skip
def test_tiles_hold_every_choice_once_and_no_more_than_needed(seed, heads, queries, pages, most, block):
    chosen, _ = drawn_choices(np.random.default_rng(seed), 1, heads, queries, pages, most)
    found = jax.tree.map(np.asarray, jax.jit(tiles, static_argnums=(1, 2))(jnp.asarray(chosen), pages, block))
    assert found.page.shape[-1] == most_tiles(queries * most, pages, block)
    for head in range(heads):
        flat = chosen[0, head].T.reshape(-1)
        needed = [-(-int((flat == p).sum()) // block) for p in range(pages)]
        total = int(found.total[0, head])
        assert total == sum(needed)
        np.testing.assert_array_equal(found.first[0, head], np.cumsum([0, *needed]))
        np.testing.assert_array_equal(found.page[0, head, :total], np.repeat(np.arange(pages), needed))
        pair = found.pair[0, head]
        np.testing.assert_array_equal((pair >= 0).sum(axis=1), found.filled[0, head])
        for tile in range(total):
            filled = found.filled[0, head, tile]
            assert filled > 0
            assert (np.diff(pair[tile, :filled]) > 0).all()  # none twice
            assert (flat[pair[tile, :filled]] == found.page[0, head, tile]).all()
        np.testing.assert_array_equal(np.sort(pair[pair >= 0]), np.flatnonzero(flat >= 0))
        assert (found.page[0, head, total:] == found.page[0, head, max(total - 1, 0)]).all()
        for number, place in enumerate(found.place[0, head]):
            assert place == -1 if flat[number] < 0 else pair.reshape(-1)[place] == number


def test_order_of_keys_too_large_to_carry_their_index():
    keys = jnp.asarray([7, 2**31 - 2, 7, 0, 2**31 - 2, 3], jnp.int32)
    np.testing.assert_array_equal(stable_order(keys, 2**31 - 1), [3, 5, 0, 2, 1, 4])
    np.testing.assert_array_equal(stable_order(jnp.minimum(keys, 9), 10), [3, 5, 0, 2, 1, 4])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": jnp.zeros((1, 2, 3, 16, 32))}, "shapes q"),
        ({"chosen": jnp.zeros((1, 1, 5, 2), jnp.int32)}, "choices of at least 1 page"),
        ({"weights": jnp.zeros((1, 2, 5, 3))}, "use the same shape"),
        ({"q": jnp.zeros((1, 5, 4, 64), jnp.bfloat16)}, "dtypes q"),
        ({"scale": 0.0}, "must be above 0"),
        ({"block": 0}, "tiles of 0 rows"),
        ({"block": 24, "implementation": "triton"}, "use a power of two"),
        ({"implementation": None}, "no hsa kernel for cpu"),
    ],
)
def test_says_what_it_does_not_take(change, words):
    x = jnp.zeros((1, 2, 3, 16, 64))
    arguments = {"q": jnp.zeros((1, 5, 4, 64)), "k": x, "v": x, "chosen": jnp.zeros((1, 2, 5, 2), jnp.int32)}
    arguments |= {"weights": jnp.zeros((1, 2, 5, 2)), "implementation": "tpu"}
    unchecked = getattr(api.hsa_attention, "__wrapped__", api.hsa_attention)
    with pytest.raises(ValueError, match=words):
        unchecked(**arguments | change)


def test_says_which_pages_it_takes():
    x = jnp.zeros((1, 2, 3, 12, 64))
    with pytest.raises(ValueError, match="pages of 12 tokens: use a multiple of 8"):
        api.hsa_attention(
            jnp.zeros((1, 5, 4, 64)), x, x, jnp.zeros((1, 2, 5, 2), jnp.int32), jnp.zeros((1, 2, 5, 2)),
            implementation="tpu",
        )  # fmt: skip
