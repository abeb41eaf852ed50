"""Decoders with random parameters, made without compiling anything."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.models import Decoder, UniformConfig


def random_decoder(config: UniformConfig, seed: int = 0) -> Decoder:
    """A float32 decoder with every parameter drawn at random by numpy."""
    random = np.random.RandomState(seed)
    shapes = jax.eval_shape(partial(Decoder, config, dtype=jnp.dtype(jnp.float32)), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape).astype(np.float32)), shapes)
