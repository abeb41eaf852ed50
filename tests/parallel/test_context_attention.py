"""Attention of sequences over the `context` axis: the numbers and gradients of one device, by every exchange."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api
from pallas_kernels.patterns import Chunked, Full, SinkWindow, SlidingWindow
from streamjax.attention.dispatch import sequence_attention
from streamjax.attention.sharded import context_shards
from streamjax.parallel.mesh import make_mesh

ROWS, LENGTH, HEADS, KEY_HEADS, WIDTH = 2, 48, 4, 2, 6


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def documents(kind):
    if kind == "one":
        return None
    ids = np.sort(np.random.default_rng(4).integers(0, 5, (ROWS, LENGTH)))
    ids[:, :20] = 0  # the first one leaves its window, and its device
    return jnp.asarray(ids, jnp.int32)


ARRAYS = (
    *(drawn(ROWS, LENGTH, n, WIDTH, seed=i) for i, n in enumerate((HEADS, KEY_HEADS, KEY_HEADS))),
    drawn(HEADS, seed=5),
)
D_OUT = drawn(ROWS, LENGTH, HEADS, WIDTH, seed=6)
EXTRAS = {"slopes": jnp.linspace(0.01, 0.2, HEADS), "softcap": 3.0}


def numbers(pattern, **options):
    """Output and gradients of attention with learned sinks, one number for each of the output's in the cotangent."""

    def loss(q, k, v, sinks):
        out = sequence_attention(q, k, v, pattern, scale=0.4, sink_logits=sinks, **options)
        return jnp.sum(out * D_OUT), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*ARRAYS)
    return out, grads


def compare(axes, pattern, kind, extras, **options):
    known = {"segment_ids": documents(kind), **(EXTRAS if extras else {})}
    expected = numbers(pattern, implementation="dense", **known)
    with jax.set_mesh(make_mesh(**axes)):
        assert context_shards(LENGTH) == axes["context"]
        found = numbers(pattern, **known, **options)
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=1e-5 * max(1.0, float(np.max(np.abs(right)))))


CONTEXT4 = {"context": 4, "tensor": 2}


@pytest.mark.usual("axes0-ring-many-True", "axes1-gather-many-True")
@pytest.mark.parametrize(
    ("axes", "exchange", "kind", "extras"),
    [
        (CONTEXT4, "ring", "many", True),
        (CONTEXT4, "gather", "many", True),
        pytest.param(CONTEXT4, "ring", "one", False, marks=pytest.mark.slow),
        ({"data": 2, "context": 2, "tensor": 2}, "ring", "one", False),
        pytest.param({"context": 8}, "ring", "many", False, marks=pytest.mark.slow),
        pytest.param({"context": 8}, "gather", "one", True, marks=pytest.mark.slow),
    ],
)
def test_full_attention(axes, exchange, kind, extras):
    compare(axes, Full(), kind, extras, exchange=exchange)


@pytest.mark.parametrize(
    ("pattern", "kind", "extras"),
    [
        (SinkWindow(3, 8), "many", True),  # keys of one neighbour, and the sinks of the first device
        (SlidingWindow(30), "one", False),  # of three
        (Chunked(20), "many", False),  # chunks that begin on one device and end on another
        pytest.param(SlidingWindow(13), "one", False, marks=pytest.mark.slow),
        pytest.param(SinkWindow(14, 8), "one", True, marks=pytest.mark.slow),  # more sinks than a device has keys
        pytest.param(Chunked(6), "many", True, marks=pytest.mark.slow),
        pytest.param(SlidingWindow(47), "one", False, marks=pytest.mark.slow),
        pytest.param(SlidingWindow(48), "one", False, marks=pytest.mark.slow),
        pytest.param(SlidingWindow(1), "one", False, marks=pytest.mark.slow),
    ],
)
def test_windows_and_chunks(pattern, kind, extras):
    compare(CONTEXT4, pattern, kind, extras)


@pytest.mark.parametrize(
    ("pattern", "exchange"),
    [
        (SinkWindow(3, 70), "auto"),
        pytest.param(Full(), "ring", marks=pytest.mark.slow),
        pytest.param(Full(), "gather", marks=pytest.mark.slow),
    ],
)
def test_kernels_on_stretches(monkeypatch, pattern, exchange):
    """Those of GPUs, in their interpreter: the numbers of XLA's loops on one device."""
    called = set()

    def instead(name):
        kernel = getattr(api, name)

        def call(*args, **known):
            called.add(name)
            return kernel(*args, **known, implementation="triton", interpret=True)

        monkeypatch.setattr(api, name, call)

    for name in ("flash_attention", "chunk_attention", "chunk_gradients"):
        instead(name)
    q, k, v, d_out = (drawn(2, 256, n, 16, seed=i) for i, n in enumerate((2, 2, 2, 2)))
    ids = jnp.asarray(np.sort(np.random.default_rng(4).integers(0, 3, (2, 256))), jnp.int32)

    def loss(q, k, v, implementation):
        known = {"scale": 0.3, "segment_ids": ids, "exchange": exchange, "implementation": implementation}
        out = sequence_attention(q, k, v, pattern, **known)
        return jnp.sum(out * d_out), out

    gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
    expected = jax.jit(partial(gradient, implementation="xla"))(q, k, v)
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)):
        found = jax.jit(partial(gradient, implementation="pallas"))(q, k, v)
    assert called == ({"flash_attention"} if pattern.sinks else {"chunk_attention", "chunk_gradients"})
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=1e-5 * max(1.0, float(np.max(np.abs(right)))))
