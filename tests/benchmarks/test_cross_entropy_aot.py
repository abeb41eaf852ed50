"""The kernel whose schedule `benchmarks/cross_entropy_aot.py` reads computes what it says."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from benchmarks.cross_entropy_aot import fused


def test_the_fused_kernel_gives_loss_and_gradients():
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((512, 128), (1024, 128)))
    targets = jnp.asarray(random.integers(0, 1024, (512, 1)), jnp.int32)

    def loss(x, w):
        logits = jax.nn.log_softmax(x @ w.T)
        return -jnp.mean(jnp.take_along_axis(logits, targets, axis=1))

    expected, (d_x, d_w) = jax.value_and_grad(loss, argnums=(0, 1))(x, w)
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(fused)(x, w, targets, jnp.ones_like(w))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    np.testing.assert_allclose(found[1], d_x, atol=1e-6)
    np.testing.assert_allclose(found[2], d_w + 1.0, atol=1e-5)
