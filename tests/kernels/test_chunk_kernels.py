"""Kernels for one chunk of a sequence against a buffer of keys, in interpreters, against every logit in float64."""

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, reference
from pallas_kernels.patterns import Full, SinkWindow, SlidingWindow
from tests.covering import rest_slow
from tests.kernels.tolerances import BACKENDS, TOLERANCE, assert_near


@lru_cache(maxsize=1)  # each case is asked of one interpreter after the other
def in_float64(
    pattern, queries, offset, *, slots=384, rows=1, row=0, heads=2, kv_heads=1, width=64, batch=1, softcap=None,
    alibi=False, packed=False, dtype="float32", sums="float32", seed=0,
):  # fmt: skip
    """Arguments of both kernels, what goes with them, and what the reference and its derivative give."""
    random = np.random.default_rng(seed)

    def drawn(*shape, dtype=dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q, d_out = drawn(batch, queries, heads, width), drawn(batch, queries, heads, width, dtype=jnp.float32)
    k, v = (drawn(rows, batch, kv_heads, slots, width) for _ in range(2))
    before = [drawn(rows, batch, kv_heads, slots, width, dtype=sums) for _ in range(2)]
    ids = np.sort(random.integers(0, 3, (batch, slots)), axis=1).astype(np.int32)
    known = {
        "scale": 1.3 / math.sqrt(width),
        "softcap": softcap,
        "slopes": jnp.float32(0.3) * 0.5 ** jnp.arange(1, heads + 1) if alibi else None,
        "segment_ids": (jnp.asarray(ids[:, offset : offset + queries]), jnp.asarray(ids)) if packed else None,
    }
    with jax.enable_x64(True):

        def loss(q, k, v):
            heads_inside = (jnp.swapaxes(x, 1, 2) for x in (k, v))
            found = reference.flash_attention(q, *heads_inside, pattern, offset=offset, **known)
            return jnp.sum(found.out * np.asarray(d_out, np.float64)), found

        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k[row], v[row])]
        (_, expected), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*exact)
        return (q, k, v, d_out, *before), known, *jax.tree.map(np.asarray, (expected, grads))


def check(backend, pattern, queries, offset, *, rows=1, row=0, dtype="float32", sums="float32", **drawn):
    """The kernels give what the reference and its derivative give; gradients are added to what the buffers hold."""
    (q, k, v, d_out, *before), known, expected, grads = in_float64(
        pattern, queries, offset, rows=rows, row=row, dtype=dtype, sums=sums, **drawn
    )

    @jax.jit
    def run(q, k, v, d_out, d_k, d_v, offset, row):
        more = known | BACKENDS[backend] | {"offset": offset, "row": row}
        part = api.chunk_attention(q, k, v, pattern, **more)
        return part, api.chunk_gradients(q, k, v, pattern, part, d_out, d_k, d_v, **more)

    part, (d_q, *d_keys) = run(q, k, v, d_out, *before, jnp.int32(offset), jnp.int32(row))
    assert_near(part, expected, dtype)
    for name, mine, right in [("q", d_q, grads[0]), *zip("kv", d_keys, grads[1:], strict=True)]:
        mine = np.asarray(mine, np.float64)
        if name != "q":
            old = np.asarray(before["kv".index(name)], np.float64)
            others = np.arange(rows) != row
            np.testing.assert_array_equal(mine[others], old[others])
            untouched = (right == 0).all(axis=-1)
            np.testing.assert_array_equal(mine[row][untouched], old[row][untouched])
            mine = mine[row] - old[row]
        coarse = TOLERANCE["bfloat16" if "bfloat16" in (dtype, sums) and name != "q" else dtype]
        assert np.max(np.abs(mine - right)) < coarse * max(np.max(np.abs(right)), 1.0), name


@pytest.mark.weekly(
    "last-chunk-packed-tpu", "window-tpu", "bf16-tpu", "first-chunk-of-a-row-tpu", "sinks-in-the-first-chunk-tpu"
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pattern", "queries", "offset", "options"),
    [
        pytest.param(Full(), 100, 0, {"rows": 3, "row": 2}, id="first-chunk-of-a-row"),
        pytest.param(Full(), 128, 256, {"heads": 4, "kv_heads": 2, "batch": 2, "packed": True}, id="last-chunk-packed"),
        pytest.param(SlidingWindow(40), 70, 210, {"slots": 512, "softcap": 2.0}, id="window"),
        pytest.param(
            SinkWindow(3, 50), 130, 140,
            {"rows": 2, "row": 1, "width": 80, "kv_heads": 2, "batch": 2, "packed": True}, id="sinks-packed",
        ),
        pytest.param(SinkWindow(3, 50), 64, 0, {"alibi": True}, id="sinks-in-the-first-chunk"),
        pytest.param(Full(), 256, 128, {"dtype": "bfloat16", "width": 128, "sums": "bfloat16"}, id="bf16"),
    ],
)  # fmt: skip
def test_matches_float64(backend, pattern, queries, offset, options):
    check(backend, pattern, queries, offset, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", rest_slow(BACKENDS, "triton"))
@settings(max_examples=3)
@given(data=st.data())
def test_drawn(backend, data):
    slots = data.draw(st.sampled_from([128, 256, 640]))
    queries = data.draw(st.integers(1, slots))
    rows = data.draw(st.integers(1, 3))
    pattern = data.draw(
        st.one_of(
            st.just(Full()),
            st.builds(SlidingWindow, st.integers(1, 300)),
            st.builds(SinkWindow, st.integers(0, 100), st.integers(1, 300)),
        )
    )
    check(
        backend, pattern, queries, data.draw(st.integers(0, slots - queries)), slots=slots, rows=rows,
        row=data.draw(st.integers(0, rows - 1)), heads=data.draw(st.sampled_from([2, 6])), kv_heads=2,
        packed=data.draw(st.booleans()), dtype=data.draw(st.sampled_from(sorted(TOLERANCE))),
    )  # fmt: skip


def test_says_what_it_does_not_take():
    q, k = jnp.zeros((1, 8, 2, 64)), jnp.zeros((1, 1, 1, 128, 64))
    unchecked = getattr(api.chunk_attention, "__wrapped__", api.chunk_attention)
    for change, message in [
        ({"k": k[0], "v": k[0]}, "use \\[B, C, H, D\\] and twice"),
        ({"q": q[:, :, :1], "k": jnp.zeros((1, 1, 2, 128, 64)), "v": jnp.zeros((1, 1, 2, 128, 64))}, "use a multiple"),
        ({"q": q.astype(jnp.float16)}, "use bfloat16 or float32 for all"),
        ({"scale": 0.0}, "above 0"),
        ({"implementation": None}, "no kernel for chunks for cpu"),
        ({"k": k[:, :, :, :100], "v": k[:, :, :, :100]}, "100 slots: the TPU kernel takes a multiple of 128"),
        ({"implementation": "triton", "k": k[:, :, :, :100], "v": k[:, :, :, :100]}, "takes a multiple of 32 here"),
        ({"pattern": SinkWindow(2000, 4), "k": jnp.zeros((1, 1, 1, 2048, 64)), "v": jnp.zeros((1, 1, 1, 2048, 64))},
         "2000 sinks"),
    ]:  # fmt: skip
        known = {"q": q, "k": k, "v": k, "pattern": Full(), "offset": 0, "implementation": "tpu"} | change
        with pytest.raises(ValueError, match=message):
            unchecked(**known)
