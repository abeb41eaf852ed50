"""Decoding kernels in interpreters against every logit in float64: rings, counts, windows, quantised slots."""

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
    counts, slots, *, first=None, queries=1, heads=4, kv_heads=2, width=64, window=None, softcap=None, bits=None,
    dtype="float32", seed=0,
):  # fmt: skip
    """Queries, what the slots hold, where they start, what goes with them, and what the reference gives."""
    random = np.random.default_rng(seed)
    batch = len(counts)
    q = jnp.asarray(random.standard_normal((batch, queries, heads, width)), dtype)
    count = jnp.asarray(counts, jnp.int32)
    start = jnp.zeros(batch, jnp.int32) if first is None else jnp.asarray(first, jnp.int32)
    known = {"scale": 0.21, "window": window, "softcap": softcap, "first": None if first is None else start}
    shape = (batch, kv_heads, slots, width)
    if bits is None:
        k, v = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(2))
        exact, more, held = (k, v), {}, [k, v]
    else:
        top = 2 ** (bits - 1)
        numbers = [jnp.asarray(random.integers(-top, top, shape), jnp.int8) for _ in range(2)]
        scales = [jnp.asarray(random.uniform(0.2, 2.0, shape[:3]) / top, jnp.float32) for _ in range(2)]
        pairs = zip(numbers, scales, strict=True)
        exact = [np.asarray(x, np.float64) * np.asarray(s, np.float64)[..., None] for x, s in pairs]
        more = {"k_scale": scales[0], "v_scale": scales[1]}
        held = [api.pack_int4(x) if bits == 4 else x for x in numbers]
    with jax.enable_x64(True):
        expected = jax.jit(lambda *arrays: reference.decode_attention(*arrays, **known))(
            *(jnp.asarray(np.asarray(x, np.float64)) for x in (q, *exact)), count
        )
    return q, held, start, known | more, jax.tree.map(np.asarray, expected)


def check(backend, counts, slots, *, bits=None, splits=None, block=128, dtype="float32", **drawn):
    """The kernel gives what the reference gives in float64.

    Where slots can, those that hold nothing hold 1e4, and NaN where the kernel does not read them at all.
    """
    q, held, start, known, expected = in_float64(counts, slots, bits=bits, dtype=dtype, **drawn)
    count = jnp.asarray(counts, jnp.int32)
    if bits is None:
        empty = ((jnp.arange(slots)[None] - start[:, None]) % slots >= count[:, None])[:, None, :, None]
        held = [jnp.where(empty, 1e4 if backend == "tpu" else jnp.nan, x) for x in held]
    found = jax.jit(
        lambda q, k, v, count: api.decode_attention(
            q, k, v, count, splits=splits, block=block, **BACKENDS[backend], **known
        )
    )(q, *held, count)
    assert_near(found, expected, dtype)


@pytest.mark.weekly("counts-tpu", "int4-tpu", "int4-triton", "bf16-tpu", "int8-tpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(((0, 1, 300), 300), id="counts"),
        pytest.param(((300, 290), 300, {"first": (17, 200), "queries": 3, "window": 100}), id="ring-window"),
        pytest.param(((0, 140, 500), 512, {"first": (9, 400, 0), "splits": 2}), id="splits"),
        pytest.param(((200, 300), 300, {"bits": 8, "first": (150, 0)}), id="int8"),
        pytest.param(((200, 300), 300, {"bits": 4, "width": 128}), id="int4"),
        pytest.param(((700,), 800, {"dtype": "bfloat16", "heads": 8, "softcap": 3.0, "block": 256}), id="bf16"),
        pytest.param(((700,), 800, {"dtype": "bfloat16", "bits": 4, "heads": 1, "kv_heads": 1}), id="bf16-int4-mqa"),
    ],
)
def test_matches_float64(backend, arguments):
    counts, slots, *more = arguments
    check(backend, counts, slots, **(more[0] if more else {}))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"width": 80, "queries": 40, "window": 70}, id="many-rows"),
        pytest.param({"width": 96, "bits": 4, "queries": 2, "window": 200}, id="int4"),
        pytest.param({"width": 256, "dtype": "bfloat16", "splits": 5, "first": (299,)}, id="more-splits-than-needed"),
    ],
)
def test_widths_that_are_padded_on_a_gpu(more):
    check("triton", (300,), 301, **{"block": None} | more)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=3)
@given(data=st.data())
def test_drawn(backend, data):
    slots = data.draw(st.integers(1, 400))
    rows = data.draw(st.integers(1, 2))
    check(
        backend, tuple(data.draw(st.integers(0, slots)) for _ in range(rows)), slots,
        first=data.draw(st.one_of(st.none(), st.tuples(*[st.integers(0, slots - 1)] * rows))),
        queries=data.draw(st.integers(1, 5)), window=data.draw(st.one_of(st.none(), st.integers(1, 300))),
        heads=data.draw(st.sampled_from([2, 6])), bits=data.draw(st.sampled_from([None, 8, 4])),
        splits=data.draw(st.integers(1, 3)), dtype=data.draw(st.sampled_from(sorted(TOLERANCE))),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": jnp.zeros((1, 2, 8, 32))}, "shapes q"),
        ({"q": jnp.zeros((1, 1, 3, 64))}, "multiple of the key heads"),
        ({"v": jnp.zeros((1, 2, 8, 64), jnp.int8)}, "dtypes q"),
        ({"k_scale": jnp.ones((1, 2, 8))}, "with scales"),
        ({"implementation": None}, "no decoding kernel for cpu"),
        ({"implementation": "triton", "block": 24}, "blocks of 24 slots"),
        (
            {name: jnp.zeros((1, 4, 4, 320)) for name in "qkv"} | {"implementation": "triton"},
            "width 320: the Triton kernel takes 256",
        ),
    ],
)
def test_says_what_it_does_not_take(change, words):
    x = jnp.zeros((1, 2, 8, 64))
    arguments = {"q": jnp.zeros((1, 1, 4, 64)), "k": x, "v": x, "count": jnp.ones(1, jnp.int32)}
    unchecked = getattr(api.decode_attention, "__wrapped__", api.decode_attention)
    with pytest.raises(ValueError, match=words):
        unchecked(**arguments | {"implementation": "tpu"} | change)
