"""Decoding kernels that read codes, in interpreters, against every logit of the widened numbers in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, reference
from tests.kernels.tolerances import BACKENDS, assert_near

HEADS = 2


def drawn(random, batch, slots, width, bits, group, along, runs=1):
    """Codes of keys or of values with numbers as real ones have them: around 0, of about 1."""
    codes = random.integers(0, 256, (batch, HEADS, slots * bits // 8, width)).astype(np.uint8)
    shape = (batch, HEADS, *((slots // group, width) if along == "channel" else (slots, runs)))
    step = random.uniform(1, 4, shape) / 2**bits
    least = -step * (2**bits - 1) * random.uniform(0.3, 0.7, shape)
    return api.Coded(jnp.asarray(codes), *(jnp.asarray(x, jnp.bfloat16) for x in (least, step)), bits, group, along)


def check(backend, counts, slots, bits, group, *, first=None, width=128, queries=1, window=None, pages=None,
          dtype="float32", along=("channel", "token"), splits=None):  # fmt: skip
    """The kernel gives what the reference gives in float64 for the numbers that the codes stand for."""
    random = np.random.default_rng(bits)
    batch = len(counts)
    q = jnp.asarray(random.standard_normal((batch, queries, 2 * HEADS, width)), dtype)
    runs = max(width // 64, 1)
    k, v = (drawn(random, batch, slots, width, bits, group, a, runs) for a in along)
    count = jnp.asarray(counts, jnp.int32)
    start = None if first is None else jnp.asarray(first, jnp.int32)
    known = {"scale": 0.21, "softcap": 20.0, "first": start}
    if pages is None:
        known |= {"window": window}
        kernel, plain, more, own = api.decode_attention, reference.decode_attention, (count,), {"splits": splits}
    else:
        table = jnp.asarray(pages, jnp.int32)
        known |= {"page_size": slots // 8}
        kernel, plain, more, own = api.paged_attention, reference.paged_attention, (table, count), {}
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(q, np.float64)), *(x.widened(jnp.float64) for x in (k, v)))
        expected = jax.tree.map(np.asarray, jax.jit(lambda *arrays: plain(*arrays, *more, **known))(*exact))
    found = jax.jit(lambda q, k, v: kernel(q, k, v, *more, **BACKENDS[backend], **own, **known))(q, k, v)
    assert_near(found, expected, dtype)


@pytest.mark.weekly("int4-tpu", "int4-triton", "one-bit-tpu", "bf16-tpu", "int8-ring-tpu", "bf16-triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(((0, 100, 256), 256, 4, 64), id="int4"),
        pytest.param(((200, 250), 256, 8, 16, {"first": (150, 0), "queries": 2, "window": 90}), id="int8-ring"),
        pytest.param(
            ((1100, 700), 1120, 2, 32, {"first": (1000, 3), "splits": 2}), id="int2-last-block-reaches-beyond"
        ),
        pytest.param(((250,), 256, 4, 64, {"dtype": "bfloat16", "first": (17,)}), id="bf16"),
        pytest.param(((250,), 256, 1, 64, {"width": 64}), id="one-bit"),
    ],
)
def test_a_ring_in_codes_matches_float64(backend, arguments):
    counts, slots, bits, group, *more = arguments
    check(backend, counts, slots, bits, group, **(more[0] if more else {}))


@pytest.mark.parametrize(
    ("backend", "along"),
    [
        ("tpu", ("token", "channel")),
        ("triton", ("token", "channel")),
        pytest.param("tpu", ("channel", "channel"), marks=pytest.mark.slow),
        pytest.param("tpu", ("token", "token"), marks=pytest.mark.slow),
    ],
)
def test_what_has_a_least_and_a_step_may_be_other(backend, along):
    check(backend, (300,), 320 if backend == "tpu" else 352, 4, 16, along=along, width=80)


PAGES = [[[3, 0, 7, -1], [5, -1, -1, -1]], [[-1, -1, -1, -1], [1, 2, 4, 6]]]


@pytest.mark.weekly("int4-tpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(((500, 370), 512, 4, 64, {"first": (17, 200)}), id="int4"),
        pytest.param(((500, 370), 1024, 2, 64, {"dtype": "bfloat16"}), id="int2-bf16"),
    ],
)
def test_pages_in_codes_match_float64(backend, arguments):
    counts, slots, bits, group, more = arguments
    check(backend, counts, slots, bits, group, pages=PAGES, **more)


SOME = api.Coded(jnp.zeros((1, 2, 64, 64), jnp.uint8), *[jnp.zeros((1, 2, 2, 64), jnp.bfloat16)] * 2, 4, 64, "channel")


ORDER = jnp.zeros((1, 2, 2, 64), jnp.uint8)
BY_TOKEN = api.Coded(SOME.codes, *[jnp.zeros((1, 2, 128, 1), jnp.bfloat16)] * 2, 4, 64, "token")


@pytest.mark.parametrize(
    ("k", "v", "words"),
    [
        (SOME, jnp.zeros((1, 2, 128, 64)), "give `Coded` for both"),
        (dataclasses.replace(BY_TOKEN, order=ORDER), BY_TOKEN, "channels in an order, of heads of 64: TPUs take"),
        (dataclasses.replace(BY_TOKEN, step=BY_TOKEN.step.astype(jnp.float32)), BY_TOKEN, "step in float32"),
        (
            dataclasses.replace(BY_TOKEN, stretch=jnp.zeros((1, 2, 3, 64), jnp.bfloat16)),
            BY_TOKEN,
            r"k: stretch .*: use \[B, K, \(2, 64\)\]",
        ),
        (api.Coded(SOME.codes, SOME.least, SOME.step, 4, 48, "channel"), SOME, "whole groups"),
        (api.Coded(SOME.codes, SOME.least, SOME.step, 4, 64, "token"), SOME, r"use \[B, K, \(128, 64\)\]"),
    ],
)
def test_says_what_it_does_not_take(k, v, words):
    with pytest.raises(ValueError, match=words) as caught:
        api.decode_attention(jnp.zeros((1, 1, 4, 64)), k, v, jnp.ones(1, jnp.int32), implementation="tpu")
    assert "\n" not in str(caught.value)
