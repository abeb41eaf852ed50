"""Layers that attend within chunks, of several shapes, and recurrent ones, on a mesh: the numbers of one device."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.parallel.mesh import make_mesh, shard_model
from tests.architectures import tiny_config
from tests.covering import rest_slow
from tests.training.gradient_checks import random_batch

ROWS, LENGTH = 4, 24


def numbers(model, tokens, batch, gradient):
    """Logits of whole sequences and of a stream, and a gradient by the layer order if asked for."""
    state = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), ROWS)
    logits = []
    for piece in np.split(tokens, [8, 16], axis=1):
        state, found = sj.step(model, state, piece)
        logits.append(np.asarray(found))
    grads = sj.training.loss_and_grad(model, batch, method="layer", chunk_size=8) if gradient else ()
    return sj.forward(model, tokens), np.concatenate(logits, axis=1), grads


@pytest.mark.slow
@pytest.mark.parametrize("gradient", rest_slow([False, True], False))
@pytest.mark.parametrize("case", rest_slow(["llama4", "gemma4-experts", "qwen3_next"], "llama4"))
def test_a_mesh_changes_nothing(case, gradient):
    """The gradient, of which tests/parallel/test_context_training.py has one through layers of the kinds, too."""
    config = tiny_config(case)
    model = sj.Decoder(config, jax.random.key(0))
    batch = random_batch(config.vocab_size, ROWS, LENGTH)
    expected = numbers(model, batch["tokens"], batch, gradient)
    mesh = make_mesh(data=2, context=2, tensor=2)
    with jax.set_mesh(mesh):
        found = numbers(shard_model(model, mesh), batch["tokens"], batch, gradient)
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5 * max(1.0, float(np.max(np.abs(right)))))
