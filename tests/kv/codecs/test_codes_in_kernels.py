"""What the decoding kernels make of each codec's slots, in interpreters, against attention to the decoded slots."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from pallas_kernels import api
from streamjax.attention.rotary import Rotary
from streamjax.kv.codecs.slots import turned
from streamjax.kv.codecs.stores import stores
from tests.covering import rest_slow
from tests.kernels.tolerances import BACKENDS

HEADS, SLOTS, WIDTH, PAGE = 2, 320, 128, 32
ROTARY = Rotary.from_frequencies(10000.0 ** -(np.arange(32) / 32))  # half of the channels do not turn
BOOKS = np.random.default_rng(9).standard_normal((HEADS * WIDTH // 4 << 8, 4)).astype(np.float32).tobytes()
CODECS = {
    "fireq": sj.kv.FireQ(4, group=16, top=2),
    "k_sort": sj.kv.BlockFloats(4, group=16),
    "unsorted": sj.kv.BlockFloats(2, block=32, group=32, sort=False),
    "gear": sj.kv.Gear(4, group=16, rank=2, outliers=2),
    "fp8": sj.kv.FP8("e5m2"),
    "by token": sj.kv.Int(8, group=64).one_by_one(),
    "vidkv": sj.kv.Mixed(32),
    "untransformed": sj.kv.Mixed(32, wide=0.3, transform=False),
    "all wide": sj.kv.Mixed(16, wide=1.0),
    "none wide": sj.kv.Mixed(16, wide=0.0),
    "cq": sj.kv.CQ(4, 8, sj.kv.Codebooks(BOOKS, BOOKS, 4, "")),
}
NO_PAGES = {("cq", "triton"), *((name, "tpu") for name in ("cq", "vidkv", "untransformed", "all wide", "none wide"))}
CASES = [
    (name, backend, where)
    for where in ("ring", "pages")
    for name in CODECS
    for backend in BACKENDS
    if where == "ring" or (name, backend) not in NO_PAGES
]
OFTEN = [
    *(("k_sort", backend, "ring") for backend in BACKENDS),
    ("gear", "triton", "ring"),
    ("fireq", "tpu", "ring"),
    ("fp8", "triton", "ring"),
    ("k_sort", "triton", "pages"),
    *((name, backend, "ring") for name in ("vidkv", "cq") for backend in BACKENDS),
]


def tokens(seed):
    """Channels that are large in every token, some tokens larger than others, and single large numbers."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((1, HEADS, SLOTS, WIDTH)) * random.lognormal(0, 1, (1, HEADS, 1, WIDTH))
    x *= random.lognormal(0, 0.5, (1, HEADS, SLOTS, 1))
    return np.where(random.random(x.shape) < 0.01, 3 * x, x).astype(np.float32)


@cache
def filled(codec):
    """Keys and values of as many tokens as there are slots, none of which waits, and what they are decoded.

    Keys that are coded before rotation are turned to positions that have wrapped, and do not follow each other."""
    position = jnp.asarray((2**32 - 5000 + np.arange(SLOTS) * 31) % 2**32, jnp.uint32)[None, None]

    @jax.jit
    def fill(k, v):
        nothing = jnp.zeros_like(k), jnp.zeros_like(v)
        slots = stores(*nothing, codec)
        both = [
            x.write(chunk, jnp.zeros(1, jnp.int32), jnp.full(1, SLOTS)) for x, chunk in zip(slots, (k, v), strict=True)
        ]
        coded = [x.for_kernels(position, ROTARY) for x in both]
        keys, values = (x.dense() for x in both)
        return coded, [x.widened() for x in coded], [turned(both[0], keys, position, ROTARY), values]

    return fill(tokens(0), tokens(1))


@pytest.mark.parametrize("case", rest_slow(CASES, *OFTEN), ids="-".join)
def test_kernels_read_codes(case):
    """A ring that wraps, whose last block of slots reaches beyond it on TPUs, or pages in any order."""
    name, backend, where = case
    (k, v), widened, dense = filled(CODECS[name])
    for one, other in zip(widened, dense, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 if name != "cq" else 5e-6)
    q = np.random.default_rng(2).standard_normal((1, 1, 2 * HEADS, WIDTH)).astype(np.float32)
    count, first = 300, 7
    seen = np.broadcast_to((np.arange(SLOTS) - first) % SLOTS < count, (HEADS, SLOTS))
    call = partial(api.decode_attention, count=jnp.array([count]), first=jnp.array([first]))
    if where == "pages":
        pages = np.array([[[3, 0, 7, -1], [9, 5, 4, 2]]], np.int32)
        seen = seen & np.stack([np.isin(np.arange(SLOTS) // PAGE, row) for row in pages[0]])
        k, v = k.in_pages(PAGE), v.in_pages(PAGE)
        call = partial(
            api.paged_attention,
            pages=jnp.asarray(pages),
            page_size=PAGE,
            count=jnp.array([count]),
            first=jnp.array([first]),
        )
    found = jax.jit(partial(call, scale=0.05, **BACKENDS[backend]))(q, k, v)
    for head in range(2 * HEADS):
        keys, values = (np.asarray(x, np.float64)[0, head // 2] for x in dense)
        logits = np.where(seen[head // 2], 0.05 * keys @ q[0, 0, head].astype(np.float64), -np.inf)
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(found.out[0, 0, head], weights @ values / weights.sum(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.lse[0, 0, head], logits.max() + np.log(weights.sum()), rtol=1e-5)
