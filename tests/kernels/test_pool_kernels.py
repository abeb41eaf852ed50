"""The kernel over a pool of pages in the interpreters against every logit in float64: whose pages, in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, reference
from tests.kernels.tolerances import BACKENDS, TOLERANCE, assert_near


def check(backend, counts, width, *, size=16, queries=1, heads=4, kv_heads=2, channels=64, softcap=None,
          dtype="float32", block=None, seed=0):  # fmt: skip
    """The kernel gives what the reference gives; pages that hold no token of a row are NaN in all others."""
    random = np.random.default_rng(seed)
    batch, named = len(counts), [-(-count // size) for count in counts]
    pages = sum(named) + 2
    q = jnp.asarray(random.standard_normal((batch, queries, heads, channels)), dtype)
    k, v = (jnp.asarray(random.standard_normal((kv_heads, pages, size, channels)), dtype) for _ in range(2))
    order, table = random.permutation(np.arange(1, pages)), np.full((batch, width), -1, np.int32)
    for row, count in enumerate(named):
        table[row, :count] = order[sum(named[:row]) : sum(named[: row + 1])]
    if batch > 1 and min(named[:2]) > 0:
        table[1, 0] = table[0, 0]  # which both begin with
    known = {"scale": 0.21, "softcap": softcap}
    count = jnp.asarray(counts, jnp.int32)
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v))
        expected = jax.tree.map(np.asarray, reference.pool_attention(*exact, jnp.asarray(table), count, **known))
    unread = np.ones(pages, bool)
    unread[table[table >= 0]] = False
    unread[0] = False  # which is fetched, and not read, for a row that has none
    k, v = (jnp.where(unread[:, None, None], jnp.nan, x) for x in (k, v))
    run = jax.jit(lambda *arrays: api.pool_attention(*arrays, block=block, **BACKENDS[backend], **known))
    assert_near(run(q, k, v, jnp.asarray(table), count), expected, dtype)


@pytest.mark.weekly("bf16-tpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(((0, 1, 90), 6), id="counts"),
        pytest.param(((128, 100), 8, {"block": 32, "softcap": 2.0}), id="steps", marks=pytest.mark.slow),
        pytest.param(((100,), 7, {"queries": 3, "heads": 6}), id="chunk", marks=pytest.mark.slow),
        pytest.param(((500, 65), 8, {"size": 64, "dtype": "bfloat16", "heads": 8, "channels": 128}), id="bf16"),
    ],
)
def test_matches_float64(backend, arguments):
    counts, width, *more = arguments
    check(backend, counts, width, **(more[0] if more else {}))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=6)
@given(data=st.data())
def test_drawn(backend, data):
    width, size = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([16, 32]))
    rows = data.draw(st.integers(1, 4))
    check(
        backend, tuple(data.draw(st.integers(0, width * size)) for _ in range(rows)), width, size=size,
        queries=data.draw(st.integers(1, 4)), heads=data.draw(st.sampled_from([2, 6])),
        block=data.draw(st.sampled_from([None, 48 if backend == "tpu" else 16])),
        dtype=data.draw(st.sampled_from(sorted(TOLERANCE))),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": jnp.zeros((2, 3, 16, 32))}, "shapes q"),
        ({"pages": jnp.zeros((2, 3), jnp.int32)}, "pages and"),
        ({"q": jnp.zeros((1, 1, 4, 64), jnp.bfloat16)}, "dtypes q"),
        ({"k": jnp.zeros((2, 3, 12, 64)), "v": jnp.zeros((2, 3, 12, 64))}, "3 pages of 12 tokens: use a multiple of 8"),
        ({"implementation": None}, "no kernel for pools for cpu"),
    ],
)
def test_says_what_it_does_not_take(change, words):
    x = jnp.zeros((2, 3, 16, 64))
    arguments = {"q": jnp.zeros((1, 1, 4, 64)), "k": x, "v": x, "pages": jnp.zeros((1, 3), jnp.int32)}
    arguments |= {"count": jnp.ones(1, jnp.int32), "implementation": "tpu"}
    unchecked = getattr(api.pool_attention, "__wrapped__", api.pool_attention)
    with pytest.raises(ValueError, match=words):
        unchecked(**arguments | change)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "pages", "options"),
    [
        (3, 4, {}),
        pytest.param(5, 9, {"queries": 3, "heads": 6, "block": 32}, marks=pytest.mark.slow),
        pytest.param(32, 3, {"size": 64, "dtype": "bfloat16", "channels": 128}, marks=pytest.mark.slow),
        pytest.param(2, 3, {"size": 128, "softcap": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_shared_pages_are_read_by_those_who_have_them(backend, rows, pages, options):
    check_shared(backend, rows, pages, **options)


def check_shared(backend, rows, pages, *, size=16, queries=1, heads=4, kv_heads=2, channels=64, softcap=None,
                 dtype="float32", block=None):  # fmt: skip
    """As `check`; the last row has no page, and the last page is none."""
    random = np.random.default_rng(pages)
    q = jnp.asarray(random.standard_normal((rows, queries, heads, channels)), dtype)
    k, v = (jnp.asarray(random.standard_normal((kv_heads, pages + 4, size, channels)), dtype) for _ in range(2))
    table, readers = random.permutation(pages + 4)[:pages].astype(np.int32), random.random((pages, rows)) < 0.6
    table[-1], readers[:, -1] = -1, False
    known, shared = {"scale": 0.21, "softcap": softcap}, (jnp.asarray(table), jnp.asarray(readers))
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v))
        expected = jax.tree.map(np.asarray, reference.shared_pool_attention(*exact, *shared, **known))
    unread = ~np.isin(np.arange(pages + 4), table)
    k, v = (jnp.where(unread[:, None, None], jnp.nan, x) for x in (k, v))
    run = jax.jit(lambda *arrays: api.shared_pool_attention(*arrays, block=block, **BACKENDS[backend], **known))
    assert_near(run(q, k, v, *shared), expected, dtype)


def test_shared_pages_have_few_readers():
    x = jnp.zeros((2, 3, 16, 64))
    with pytest.raises(ValueError, match="of at most 32 rows"):
        api.shared_pool_attention(jnp.zeros((33, 1, 4, 64)), x, x, jnp.zeros(3, jnp.int32), jnp.zeros((3, 33), bool))
