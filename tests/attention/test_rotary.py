"""The uint32 phase against float64, from position 0 to the wrap at 2^32 and across it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.attention.rotary import Rotary, rotate

pytestmark = pytest.mark.quick
WIDTH, THETA = 128, 500_000.0
FREQUENCIES = THETA ** -(np.arange(0, WIDTH, 2) / WIDTH)
ROTARY = Rotary.from_frequencies(FREQUENCIES)
rotated = jax.jit(lambda x, position: ROTARY(x, position))
DISTANCES = np.array([0, 1, 2, 17, 128, 511, 1024, 1999, 2000])
WRAP = 2**32
STARTS = [0, 5_000, 4_000_000, 1_000_000_000, 2_000_000_000, 2**31 - 700, WRAP - 2001, WRAP - 700]


def vectors(count, seed=0):
    return np.random.RandomState(seed).standard_normal((count, WIDTH)).astype(np.float32)


def true_logits(q, k, distance):
    """q at `distance` from k, in float64: logits depend on nothing else."""
    q, k = (x.astype(np.float64) for x in (q, k))
    angle = distance[:, None] * FREQUENCIES
    half = WIDTH // 2
    first = q[:, :half] * np.cos(angle) - q[:, half:] * np.sin(angle)
    second = q[:, half:] * np.cos(angle) + q[:, :half] * np.sin(angle)
    return (np.concatenate([first, second], axis=1) * k).sum(axis=1) / np.sqrt(WIDTH)


def logits(turn, q, k, query_position, key_position):
    """Logits of rotated queries and keys, the product in float64 so that only the rotation errs."""
    turned = [turn(x, position) for x, position in ((q, query_position), (k, key_position))]
    return (np.float64(turned[0]) * np.float64(turned[1])).sum(axis=1) / np.sqrt(WIDTH)


def by_phase(x, position):
    wrapped = jnp.asarray((position % WRAP).astype(np.uint32))
    return np.asarray(rotated(x[None, :, None], wrapped[None]))[0, :, 0]


def by_float32_angles(x, position):
    angle = np.float32(position)[:, None] * np.float32(FREQUENCIES)
    return np.asarray(rotate(jnp.asarray(x), jnp.cos(angle), jnp.sin(angle)))


def error(turn, start):
    """Largest logit error over random pairs at every distance, keys at `start` and a little later."""
    distance = np.tile(DISTANCES, 40)
    key_position = start + np.arange(len(distance), dtype=np.int64)
    q, k = vectors(len(distance), 1), vectors(len(distance), 2)
    actual = logits(turn, q, k, key_position + distance, key_position)
    return np.abs(actual - true_logits(q, k, distance)).max()


@pytest.mark.parametrize("start", STARTS)
def test_logits_at_any_position(start):
    assert error(by_phase, start) < 1e-5


def test_float32_angles_would_fail():
    assert error(by_float32_angles, 0) < 2e-3
    assert error(by_float32_angles, 4_000_000) > 1e-2
    assert error(by_float32_angles, 2_000_000_000) > 1.0


def test_phase_is_exact_modulo_one_turn():
    rotary = Rotary((1, 3, 2**31, 2**32 - 1, 683_565_276))
    for position in (0, 1, 2**16 + 1, 2**31, 2**32 - 1):
        cos, sin = rotary.table(jnp.array([position], jnp.uint32))
        turns = np.array([(position * step) % WRAP for step in rotary.steps], np.float64) / WRAP
        np.testing.assert_allclose(cos[0], np.cos(2 * np.pi * turns), atol=3e-7)
        np.testing.assert_allclose(sin[0], np.sin(2 * np.pi * turns), atol=3e-7)


def test_a_window_rotates_alike_wherever_it_stands():
    """Dot products of a whole window across the wrap equal those near 0."""
    q, k = vectors(64, 1), vectors(64, 2)
    grams = [by_phase(q, start + np.arange(64)) @ by_phase(k, start + np.arange(64)).T for start in (0, WRAP - 32)]
    np.testing.assert_allclose(grams[1], grams[0], atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_partial_rotation_is_transformers(scale):
    """The first channels turn in halves and are scaled, the others pass: YaRN's and LongRoPE's factor included."""
    torch = pytest.importorskip("torch")
    gpt_neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    rotary = Rotary.from_frequencies(1000.0 ** -(np.arange(0, 12, 2) / 12), scale)
    x = np.random.RandomState(0).standard_normal((2, 9, 3, 20)).astype(np.float32)
    position = np.arange(9)
    angle = torch.tensor(np.outer(position, 1000.0 ** -(np.arange(0, 12, 2) / 12)), dtype=torch.float32)
    cos, sin = (torch.cat([part, part], -1)[None] * scale for part in (angle.cos(), angle.sin()))
    heads_first = torch.tensor(x).transpose(1, 2)
    expected, _ = gpt_neox.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    actual = rotary(jnp.asarray(x), jnp.broadcast_to(jnp.asarray(position, jnp.uint32), (2, 9)))
    np.testing.assert_allclose(actual, expected.transpose(1, 2).numpy(), atol=1e-5)
    np.testing.assert_array_equal(actual[..., 12:], x[..., 12:])


def test_dtype_is_kept_and_rotation_happens_in_float32():
    x = jnp.asarray(vectors(4), jnp.bfloat16)[None, :, None]
    position = jnp.array([[0, 3, 999, 4_000_000_000]], jnp.uint32)
    turned = ROTARY(x, position)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, ROTARY(x.astype(jnp.float32), position).astype(jnp.bfloat16))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
