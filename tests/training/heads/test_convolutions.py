"""Convolutions that merge what a cache cannot keep: what training does to them, the file, the cache that takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.merging.kernel_file import LayerKernels
from streamjax.training.heads.convolutions import ConvolutionConfig, as_file, train_convolutions
from tests.streaming.tiny_models import GQA, build, random_tokens

CONFIG = ConvolutionConfig(steps=25, learning_rate=0.02, slots=4, width=3, window=4, size=6, every=8)
TOKENS = random_tokens(2, 48)


@pytest.fixture(scope="module")
def model():
    return build(GQA)


def saved(model, folder):
    """A file of drawn weights."""
    draw = np.random.default_rng(3)
    drawn = {i: (draw.standard_normal((4, 12, 3)), draw.standard_normal(4), np.full(1, 0.4)) for i in range(2)}
    weights = jax.tree.map(jnp.asarray, drawn)
    as_file(model, weights, 96).save(folder / "kernels.safetensors")
    return folder / "kernels.safetensors"


@pytest.mark.slow
def test_training_lowers_what_the_text_costs(model, tmp_path):
    """The loss is what a stream costs under the cache that takes the file."""
    steps = list(train_convolutions(model, [TOKENS] * CONFIG.steps, CONFIG))
    assert steps[-1].loss < steps[0].loss - 0.05
    as_file(model, steps[-2].weights, 96).save(tmp_path / "kernels.safetensors")
    caches = sj.kv.preset("lococo", kernels=tmp_path / "kernels.safetensors", window=4, size=6, every=8)
    _, nats = sj.score(model, sj.init_state(model, caches, batch_size=2), TOKENS, 8)
    np.testing.assert_allclose(np.asarray(nats)[:, CONFIG.held :].mean(), steps[-1].loss, rtol=1e-3)


def test_a_file_makes_a_cache_for_its_model_alone(model, tmp_path):
    file, broken = saved(model, tmp_path), tmp_path / "broken.safetensors"
    assert LayerKernels.load(file).tokens == 96
    caches = sj.kv.preset("lococo", kernels=str(file), window=4, size=6, every=8)
    state = sj.init_state(model, caches)
    assert sj.kv.describe(caches, model).total == sum(x.nbytes for x in jax.tree.leaves(state))
    assert caches[0] != caches[1]
    assert caches[0].renumbered() == caches[1].renumbered()  # one program
    broken.write_bytes(b"no tensors")
    for act, message in (
        (lambda: sj.init_state(build(GQA, seed=1), caches), "measured with model [0-9a-f]{16}, and this one is"),
        (lambda: sj.kv.preset("lococo"), "lococo needs trained convolutions: give kernels=FILE"),
        (lambda: sj.kv.preset("lococo", kernels=str(broken)), "broken.safetensors: no merging convolutions could be"),
        (lambda: sj.kv.preset("lococo", kernels=str(file), size=3), "the kernels fill 4 slots, and size is 3"),
        (lambda: sj.kv.Convolved().memory(sj.kv.KVSpec(1, 2, 6, np.dtype(np.float32))), "has no kernels: train them"),
        (
            lambda: caches[0].init(sj.kv.KVSpec(1, 2, 4, np.dtype(np.float32), 2)),
            "the kernels are of 12 channels, and the layer's heads have 8",
        ),
        (lambda: ConvolutionConfig(width=4), "ConvolutionConfig.width is 4: it must be odd"),
        (lambda: ConvolutionConfig(slots=8, size=4), "ConvolutionConfig.slots is 8, and size is 4"),
        (
            lambda: next(train_convolutions(model, [TOKENS[:, :24]], CONFIG)),
            "rows of 24 tokens: the first merges lie in front of token 24",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
