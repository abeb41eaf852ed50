"""Kernels of losses, in the TPU interpreter, against float64: statistics of logits, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, argument_checks, reference
from pallas_kernels.tpu import token_stats as tpu
from tests.kernels.tolerances import BACKENDS, TOLERANCE

TPU = BACKENDS["tpu"]


def assert_close(found, expected, dtype):
    error = np.max(np.abs(np.asarray(found, np.float64) - expected))
    assert error < TOLERANCE[dtype] * np.max(np.abs(expected))


def drawn(tokens, width, vocabulary, vocab_axis, dtype, seed):
    """Hidden states, a matrix, targets, and slopes of a loss along each statistic."""
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.standard_normal((tokens, width)), dtype)
    w = random.standard_normal((vocabulary, width)) * width**-0.5 * 2
    targets = jnp.asarray(random.integers(0, vocabulary, tokens), jnp.int32).at[-1].set(vocabulary - 1)
    slopes = tuple(jnp.asarray(random.standard_normal(tokens), jnp.float32) for _ in range(3))
    return x, jnp.asarray(w if vocab_axis == 0 else w.T, dtype), targets, slopes


def check(
    tokens, vocabulary, *, width=64, vocab_axis=0, softcap=None, block=None, dtype="float32", trained=True,
    sums="float32", seed=0,
):  # fmt: skip
    """Statistics, and gradients onto what `d_w` held before."""
    x, w, targets, slopes = drawn(tokens, width, vocabulary, vocab_axis, dtype, seed)
    d_w = jnp.asarray(np.random.default_rng(1).standard_normal(w.shape), sums) if trained else None
    known = {"vocab_axis": vocab_axis, "softcap": softcap}
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(a, np.float64)) for a in (x, w))

        @jax.jit
        def run(x, w, slopes):
            expected, pull = jax.vjp(lambda x, w: reference.token_stats(x, w, targets, **known), x, w)
            return expected, pull(slopes)

        expected, gradients = run(*exact, tuple(jnp.asarray(np.asarray(slope, np.float64)) for slope in slopes))
        expected, gradients = jax.tree.map(np.asarray, (expected, gradients))
    found = jax.jit(lambda x, w: api.token_stats(x, w, targets, block=block, **TPU, **known))(x, w)
    for mine, right in zip(found, expected, strict=True):
        assert_close(mine, right, dtype)
    d_x, grown = jax.jit(
        lambda x, w, lse, d_w: api.token_stats_gradients(
            x, w, targets, lse, api.LogitStats(*slopes), d_w, block=block, **TPU, **known
        )
    )(x, w, found.lse, d_w)
    assert_close(d_x, gradients[0], dtype)
    if trained:
        assert grown.dtype == d_w.dtype
        assert_close(grown, np.asarray(d_w, np.float64) + gradients[1], max(sums, dtype, key=TOLERANCE.get))
    else:
        assert grown is None


@pytest.mark.usual("nothing-divides", "columns-capped", "sums-in-bf16")
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "options"),
    [
        pytest.param(300, 700, {"block": 256}, id="nothing-divides"),
        pytest.param(256, 512, {"vocab_axis": 1, "softcap": 3.0, "block": 128}, id="columns-capped"),
        pytest.param(20, 300, {"vocab_axis": 1, "dtype": "bfloat16", "block": 128}, id="bf16"),
        pytest.param(256, 384, {"trained": False, "block": 256}, id="matrix-not-trained"),
        pytest.param(512, 300, {"sums": "bfloat16"}, id="sums-in-bf16"),
    ],
)
def test_matches_float64(tokens, vocabulary, options):
    check(tokens, vocabulary, **options)


@pytest.mark.slow
@settings(max_examples=3)
@given(data=st.data())
def test_drawn(data):
    check(
        data.draw(st.integers(1, 600)), data.draw(st.integers(2, 600)), width=data.draw(st.sampled_from([8, 96])),
        vocab_axis=data.draw(st.integers(0, 1)), softcap=data.draw(st.sampled_from([None, 5.0])),
        dtype=data.draw(st.sampled_from(sorted(TOLERANCE))), trained=data.draw(st.booleans()),
    )  # fmt: skip


def test_several_tiles(monkeypatch):
    """What does not fit the chip's memory at once is cut, and gradients of the matrix go from tile to tile."""
    monkeypatch.setattr(tpu, "TILE", tpu.PIECE)
    check(3 * tpu.PIECE - 5, 300, block=256)


def test_is_differentiable():
    x, w, targets, slopes = drawn(40, 32, 200, 0, "float32", 0)

    def loss(stats):
        return sum(jnp.sum(slope * jnp.square(value)) for slope, value in zip(slopes, stats, strict=True))

    @jax.jit
    def both(x, w):
        right = jax.grad(lambda x, w: loss(reference.token_stats(x, w, targets)), argnums=(0, 1))(x, w)
        return jax.grad(lambda x, w: loss(api.token_stats(x, w, targets, **TPU)), argnums=(0, 1))(x, w), right

    found, right = both(x, w)
    for mine, other in zip(found, right, strict=True):
        assert_close(mine, np.asarray(other, np.float64), "float32")


def test_a_target_outside_counts_nothing():
    """As the devices of a split vocabulary need it."""
    x, w, _, _ = drawn(8, 32, 200, 0, "float32", 0)
    targets = jnp.asarray([-1, 200, 255, -300, 0, 199, 1 << 20, 5], jnp.int32)
    found = np.asarray(api.token_stats(x, w, targets, **TPU).logit)
    expected = np.where((targets >= 0) & (targets < 200), np.sum(x * w[np.clip(targets, 0, 199)], axis=1), 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "width", "itemsize"), [(2048, 896, 2), (2048, 4096, 2), (5000, 2560, 2), (100, 896, 4), (2048, 8192, 2)]
)
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_fit(tokens, width, itemsize, backward):
    """A tile, and double buffers of blocks, and room for a product of a piece and a block."""
    tile, block = tpu.sizes(tokens, width, 151_936, itemsize, backward)
    tiles = -(-tokens // tile)
    assert tile % tpu.PIECE == 0
    assert tiles * tile - tokens < tiles * tpu.PIECE
    once = tile * width * (itemsize + 4 if backward else 2 * itemsize)
    blocks = block * width * (3 * itemsize + (16 if backward else 0))
    assert once + blocks + 4 * tpu.PIECE * block <= tpu.VMEM_BYTES


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="width 16384: the TPU kernel for losses takes 8192 at most; use"):
        tpu.sizes(2048, 16384, 151_936, 2, backward=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((200, 31))}, "shapes x"),
        ({"vocab_axis": 1}, "shapes x"),
        ({"targets": jnp.zeros(7, jnp.int32)}, "targets"),
        ({"x": jnp.zeros((8, 32), jnp.bfloat16)}, "dtypes"),
        ({"block": 100}, "blocks of 100"),
    ],
)
def test_refuses_in_one_line(change, message):
    known = {"x": jnp.zeros((8, 32)), "w": jnp.zeros((200, 32)), "targets": jnp.zeros(8, jnp.int32)}
    with pytest.raises(ValueError, match=message) as error:
        argument_checks.token_stats(**{**known, "vocab_axis": 0, "block": None, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("implementation", "name"), [("triton", "triton"), (None, "cpu")])
def test_says_where_there_is_no_kernel(implementation, name):
    with pytest.raises(ValueError, match=f"no kernel for losses for {name}; use streamjax's XLA path"):
        api.token_stats(
            jnp.zeros((8, 32)), jnp.zeros((200, 32)), jnp.zeros(8, jnp.int32), implementation=implementation
        )
