"""Attention kernels in interpreters against every logit in float64: outputs, log-sum-exps and all gradients."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import api, reference
from pallas_kernels.patterns import Full, SinkWindow, SlidingWindow
from tests.covering import on_each

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
MANY = jnp.zeros((1, 5000, 2, 64))
INTERPRETERS = {"tpu": pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"), "triton": True}


def arrays(dtype, batch, queries, keys, heads, kv_heads, width, seed):
    random = np.random.default_rng(seed)
    shapes = (batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes], random


def loss_of(attention, out_weights, lse_weights):
    """A scalar that depends on every output, and the outputs; -inf in lse stays out of it."""

    def loss(q, k, v, sink_logits):
        found = attention(q, k, v, sink_logits=sink_logits)
        lse = jnp.where(jnp.isneginf(found.lse), 0.0, found.lse)
        return jnp.sum(found.out * out_weights) + jnp.sum(lse * lse_weights), found

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)


@lru_cache(maxsize=1)  # each case is asked of one interpreter after the other
def in_float64(
    pattern, queries, keys, *, heads=2, kv_heads=1, width=64, offset=0, softcap=None, alibi=False, packed=False,
    batch=1, dtype="float32", learned=False, seed=0,
):  # fmt: skip
    """Inputs, what goes with them, weights of the outputs, and what the reference gives: for every interpreter."""
    inputs, random = arrays(dtype, batch, queries, keys, heads, kv_heads, width, seed)
    out_weights = random.standard_normal((batch, queries, heads, width))
    lse_weights = random.standard_normal((batch, queries, heads))
    ids = np.sort(random.integers(0, 3, (batch, max(queries + offset, keys))), axis=1).astype(np.int32)
    inputs.append(jnp.asarray(random.standard_normal(heads), jnp.float32) if learned else None)
    known = {
        "scale": 1.3 / math.sqrt(width),
        "softcap": softcap,
        "slopes": jnp.float32(0.3) * 0.5 ** jnp.arange(1, heads + 1) if alibi else None,
        "segment_ids": tuple(map(jnp.asarray, (ids[:, offset : offset + queries], ids[:, :keys]))) if packed else None,
    }
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs[:3]]
        attention = partial(reference.flash_attention, pattern=pattern, offset=offset, **known)
        (_, found), grads = jax.jit(loss_of(attention, out_weights, lse_weights))(*exact, inputs[3])
        return inputs, known, out_weights, lse_weights, *jax.tree.map(np.asarray, (found, grads))


def check(
    pattern, queries, keys, *, offset=0, traced=False, block_q=128, block_k=128, implementation="tpu", interpret=None,
    dtype="float32", **drawn,
):  # fmt: skip
    """The kernel gives what the reference gives in float64 for the same arguments."""
    inputs, known, out_weights, lse_weights, expected, expected_grads = in_float64(
        pattern, queries, keys, offset=offset, dtype=dtype, **drawn
    )

    def run(q, k, v, sink_logits, offset):
        attention = partial(
            api.flash_attention, pattern=pattern, offset=offset, implementation=implementation,
            interpret=interpret or INTERPRETERS[implementation], block_q=block_q, block_k=block_k, **known,
        )  # fmt: skip
        return loss_of(attention, out_weights.astype(np.float32), lse_weights.astype(np.float32))(q, k, v, sink_logits)

    if traced:
        (_, found), grads = jax.jit(run)(*inputs, jnp.int32(offset))
    else:
        (_, found), grads = jax.jit(partial(run, offset=offset))(*inputs)
    some = ~np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(found.lse), ~some)
    np.testing.assert_array_equal(np.asarray(found.out)[~some], 0.0)
    pairs = [
        ("out", found.out, expected.out),
        ("lse", np.asarray(found.lse)[some], expected.lse[some]),
        *zip("qkvs", jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=False),
    ]
    for name, mine, right in pairs:
        scale = np.max(np.abs(right))
        if name == "s":  # a sum over queries, whose parts may cancel: as large as they are
            weights = np.exp(np.asarray(inputs[3], np.float64) - expected.lse)
            parts = np.abs(np.sum(out_weights * expected.out, axis=-1)) + np.abs(lse_weights)
            scale = np.max(np.sum(weights * parts, axis=(0, 1)))
        error = np.max(np.abs(np.asarray(mine, np.float64) - right)) / scale
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("implementation", "pattern", "queries", "keys", "options"),
    on_each(
        INTERPRETERS,
        [
            pytest.param(Full(), 300, 300, {"learned": True}, id="full", marks=pytest.mark.slow),
            pytest.param(
                SinkWindow(5, 100), 270, 270, {"heads": 4, "kv_heads": 2, "width": 80}, id="sinks",
                marks=pytest.mark.slow,
            ),
            pytest.param(SlidingWindow(1), 140, 140, {"width": 256}, id="itself-only"),
            pytest.param(Full(), 200, 700, {"offset": 390, "traced": True, "block_q": 256}, id="traced-offset"),
            pytest.param(
                SinkWindow(3, 150), 200, 700,
                {"offset": 390, "traced": True, "alibi": True, "learned": True, "heads": 4, "kv_heads": 2, "width": 80},
                id="sinks-traced-alibi",
            ),
            pytest.param(SinkWindow(130, 60), 300, 300, {"packed": True, "softcap": 2.0}, id="many-sinks-packed"),
            pytest.param(SlidingWindow(40), 200, 100, {"offset": 80, "heads": 3, "kv_heads": 3}, id="some-see-nothing"),
            pytest.param(Full(), 300, 300, {"dtype": "bfloat16", "width": 128}, id="bf16"),
            pytest.param(
                SinkWindow(4, 200), 600, 600, {"dtype": "bfloat16", "width": 96, "block_k": 256}, id="bf16-sinks",
                marks=pytest.mark.slow,
            ),
        ],
        weekly={"tpu": ("itself-only", "traced-offset", "some-see-nothing", "many-sinks-packed", "bf16")},
    ),
)  # fmt: skip
def test_matches_float64(pattern, queries, keys, options, implementation):
    small = {"block_q": 64, "block_k": 32} if implementation == "triton" else {}
    check(pattern, queries, keys, **options | small, implementation=implementation)


@st.composite
def drawn(draw):
    queries, offset = draw(st.integers(1, 400)), draw(st.sampled_from([0, 0, 37, 300]))
    kv_heads = draw(st.sampled_from([1, 2]))
    pattern = draw(
        st.one_of(
            st.just(Full()),
            st.builds(SlidingWindow, st.integers(1, 300)),
            st.builds(SinkWindow, st.integers(0, 140), st.integers(1, 300)),
        )
    )
    implementation = draw(st.sampled_from(sorted(INTERPRETERS)))
    blocks = st.sampled_from([128, 256] if implementation == "tpu" else [16, 64])
    return (pattern, queries, queries + offset), {
        "implementation": implementation,
        "offset": offset,
        "traced": draw(st.booleans()),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 3])),
        "width": draw(st.sampled_from([64, 80, 128])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "alibi": draw(st.booleans()),
        "packed": draw(st.booleans()),
        "learned": draw(st.booleans()),
        "dtype": draw(st.sampled_from(sorted(TOLERANCE))),
        "block_q": draw(blocks),
        "block_k": draw(blocks),
        "seed": draw(st.integers(0, 9)),
    }


@pytest.mark.slow
@settings(max_examples=150)
@given(arguments=drawn())
def test_drawn(arguments):
    check(*arguments[0], **arguments[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": jnp.zeros((1, 8, 3, 64))}, "3 query heads for 2 key heads"),
        ({"k": jnp.zeros((1, 8, 2, 32))}, "shapes q"),
        ({"v": jnp.zeros((1, 8, 2, 64), jnp.float16)}, "implementation='xla' takes any"),
        ({"scale": -1.0}, "must be above 0"),
        ({"implementation": None}, "no attention kernel for cpu"),
        ({"implementation": "cuda"}, "no attention kernel for cuda"),
        ({"block_q": 100, "q": jnp.zeros((1, 300, 2, 64))}, "multiples of 128"),
        ({"pattern": SinkWindow(4000, 8), "k": MANY, "v": MANY}, "4000 sinks"),
        ({"segment_ids": jnp.zeros((1, 8), jnp.int32), "q": jnp.zeros((1, 4, 2, 64))}, "give a pair"),
    ],
)
def test_says_what_it_does_not_take(change, words):
    x = jnp.zeros((1, 8, 2, 64))
    arguments = {"q": x, "k": x, "v": x, "pattern": Full(), "implementation": "tpu"} | change
    unchecked = getattr(api.flash_attention, "__wrapped__", api.flash_attention)  # the tests' own checks come first
    with pytest.raises(ValueError, match=words):
        unchecked(**arguments)
