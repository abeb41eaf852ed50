"""The paged decoding kernel in the interpreter against every logit in float64: which pages, which of their slots."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, reference
from tests.kernels.tolerances import BACKENDS, TOLERANCE, assert_near


@lru_cache(maxsize=1)  # each case is asked of one interpreter after the other
def in_float64(
    counts, pages, named, *, size=16, first=None, queries=1, heads=4, kv_heads=2, width=64, softcap=None,
    dtype="float32", seed=0,
):  # fmt: skip
    """Queries, keys, values and tables of pages, what goes with them, and what the reference gives."""
    random = np.random.default_rng(seed)
    batch, slots = len(counts), pages * size
    q = jnp.asarray(random.standard_normal((batch, queries, heads, width)), dtype)
    k, v = (jnp.asarray(random.standard_normal((batch, kv_heads, slots, width)), dtype) for _ in range(2))
    # each head names other pages, in any order; some name fewer
    table = np.stack([[random.permutation(pages)[:named] for _ in range(kv_heads)] for _ in range(batch)])
    table[0, 0, named // 2 :] = -1
    start = None if first is None else jnp.asarray(first, jnp.int32)
    known = {"page_size": size, "scale": 0.21, "softcap": softcap, "first": start}
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v))
        run = jax.jit(lambda *arrays: reference.paged_attention(*arrays, **known))
        expected = run(*exact, jnp.asarray(table, jnp.int32), jnp.asarray(counts, jnp.int32))
    return q, k, v, table, known, jax.tree.map(np.asarray, expected)


def check(backend, counts, pages, named, *, size=16, first=None, block=None, dtype="float32", **drawn):
    """The kernel gives what the reference gives; in pages that no head names every number is NaN."""
    q, k, v, table, known, expected = in_float64(counts, pages, named, size=size, first=first, dtype=dtype, **drawn)
    count, slots = jnp.asarray(counts, jnp.int32), pages * size
    unread = (np.arange(pages)[:, None] != table[:, :, None]).all(axis=-1).repeat(size, axis=-1)[..., None]
    if backend == "tpu":
        unread[table[:, :, 0] < 0, :size] = False  # a head that names none has page 0 fetched
    else:
        oldest = 0 if first is None else np.asarray(first)[:, None]
        unread |= ((np.arange(slots) - oldest) % slots >= np.asarray(counts)[:, None])[:, None, :, None]
    k, v = (jnp.where(unread, jnp.nan, x) for x in (k, v))
    found = jax.jit(
        lambda q, k, v, table, count: api.paged_attention(
            q, k, v, table, count, block=block, **BACKENDS[backend], **known
        )
    )(q, k, v, jnp.asarray(table, jnp.int32), count)
    assert_near(found, expected, dtype)


@pytest.mark.weekly("bf16-tpu", "one-page-tpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(((0, 1, 90), 8, 3), id="counts"),
        pytest.param(((128, 100), 8, 5, {"first": (40, 77), "block": 32}), id="ring-steps"),
        pytest.param(((100,), 8, 1, {"queries": 3, "softcap": 2.0}), id="one-page"),
        pytest.param(((500,), 8, 8, {"size": 64, "heads": 2}), id="shares"),
        pytest.param(((500,), 8, 6, {"size": 64, "dtype": "bfloat16", "heads": 8, "width": 128}), id="bf16"),
    ],
)
def test_matches_float64(backend, arguments):
    counts, pages, named, *more = arguments
    check(backend, counts, pages, named, **(more[0] if more else {}))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=3)
@given(data=st.data())
def test_drawn(backend, data):
    rows, pages, size = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 9)), data.draw(st.sampled_from([16, 32]))
    slots = pages * size
    check(
        backend, tuple(data.draw(st.integers(0, slots)) for _ in range(rows)), pages, data.draw(st.integers(1, pages)),
        size=size,
        first=data.draw(st.one_of(st.none(), st.tuples(*[st.integers(0, slots - 1)] * rows))),
        queries=data.draw(st.integers(1, 4)), heads=data.draw(st.sampled_from([2, 6])),
        block=data.draw(st.sampled_from([None, 48 if backend == "tpu" else 16])),
        dtype=data.draw(st.sampled_from(sorted(TOLERANCE))),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": jnp.zeros((1, 2, 32, 32))}, "shapes q"),
        ({"pages": jnp.zeros((1, 1, 2), jnp.int32)}, "same rows and key heads"),
        ({"v": jnp.zeros((1, 2, 32, 64), jnp.bfloat16)}, "dtypes q"),
        ({"page_size": 12}, "page_size 12 and 32 slots: use a multiple of 8"),
        ({"implementation": None}, "no paged kernel for cpu"),
        ({"implementation": "triton", "block": 8}, "blocks of 8 slots"),
    ],
)
def test_says_what_it_does_not_take(change, words):
    x = jnp.zeros((1, 2, 32, 64))
    arguments = {"q": jnp.zeros((1, 1, 4, 64)), "k": x, "v": x, "pages": jnp.zeros((1, 2, 2), jnp.int32)}
    arguments |= {"count": jnp.ones(1, jnp.int32), "page_size": 16, "implementation": "tpu"}
    unchecked = getattr(api.paged_attention, "__wrapped__", api.paged_attention)
    with pytest.raises(ValueError, match=words):
        unchecked(**arguments | change)
