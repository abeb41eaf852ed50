"""Loss and gradient of a pipeline on eight virtual devices: those of one device, along whole and partial paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, ExpertsConfig, ModelConfig
from streamjax.models.layer_stacking import layer_of, with_layers
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training import CrossEntropy
from streamjax.training.backprop.loss_and_grad import whole_loss
from streamjax.training.pipeline.gradient import pipeline_loss_and_grad
from streamjax.training.pipeline.paths import PipelineConfig
from streamjax.training.pipeline.schedule import plan
from tests.training.gradient_checks import assert_same, gradient, random_batch, random_model

ROWS, LENGTH, MICROBATCHES = 8, 12, 4
HEADS = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
WINDOW = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, window=5)
BLOCKS = tuple(BlockConfig(mixer=mixer, mlp=DenseConfig(24)) for mixer in (HEADS, WINDOW))
CONFIG = ModelConfig(vocab_size=32, d_model=16, blocks=BLOCKS * 4, tie_embeddings=True)


@functools.cache
def model_and_batch(layers=8):
    config = CONFIG.replace(blocks=CONFIG.blocks if layers == 8 else BLOCKS[:1] * layers)
    with jax.enable_x64(True):
        return random_model(config, stacked=True), random_batch(32, ROWS, LENGTH, packed=True)


@functools.cache
def alone():
    return gradient(*model_and_batch(), "full")


def by_pipeline(axes, model, batch, **options):
    """Loss and gradient on a mesh."""
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        placed = shard_model(model, mesh)
        assert placed.stack[0].mlp.down.sharding.spec[0] == "stage"
        run = jax.jit(functools.partial(pipeline_loss_and_grad, microbatches=MICROBATCHES, **options))
        loss, grads = run(placed, batch)
    return jax.device_get(loss), jax.device_get(grads)


@pytest.mark.parametrize(
    ("axes", "method"),
    [
        ({"stage": 4, "data": 2}, "remat"),
        pytest.param({"stage": 2, "data": 2, "tensor": 2}, "full", marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_has_the_gradient_of_one_device(axes, method):
    with jax.enable_x64(True):
        assert_same(by_pipeline(axes, *model_and_batch(), method=method), alone())


def test_partial_and_reordered_paths_have_the_gradient_of_their_layers():
    with jax.enable_x64(True):
        pipeline = PipelineConfig(skip=0.5, swaps=1)
        model, batch = model_and_batch(layers=4)
        objective, batch = CrossEntropy(), {name: jnp.asarray(x) for name, x in batch.items()}
        prepared = objective.prepare(batch)
        paths = plan(4, MICROBATCHES, pipeline).paths
        assert len(set(paths)) > 1

        def loss(model, path, part, own):
            layers = [layer_of(model.stack[0], stage) for stage in path]
            return whole_loss(with_layers(model, [], layers), part, own, objective, LENGTH)

        one, found = jax.jit(jax.value_and_grad(loss)), []
        for index, path in enumerate(paths):
            parts = ({k: x[index::MICROBATCHES] for k, x in arrays.items()} for arrays in (batch, prepared))
            found.append(one(model, jnp.array(path, jnp.int32), *parts))
        expected = jax.tree.map(lambda *each: np.sum(each, axis=0), *found)
        assert_same(by_pipeline({"stage": 4, "data": 2}, model, batch, pipeline=pipeline), expected)


def refused(model, batch, microbatches=4, axes=None, **options):
    with jax.set_mesh(make_mesh(**(axes or {"stage": 4, "data": 2}))):
        pipeline_loss_and_grad(model, batch, microbatches, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": {"stage": 4, "fsdp": 2}}, "mesh.fsdp is 2: stages of a pipeline go with data and tensor only"),
        ({"method": "layer"}, "backprop.method 'layer' with mesh.stage 4: use full or remat"),
        ({"axes": {"stage": 8}}, "mesh.stage is 8, and the model repeats 2 layers 4 times: use a number of stages"),
        ({"microbatches": 3}, "8 rows cannot be dealt out to 3 microbatches"),
        ({"model": random_model(CONFIG, "float32")}, "a pipeline of 4 stages needs stacked layers"),
        (
            {
                "model": random_model(
                    CONFIG.replace(blocks=(BlockConfig(mixer=HEADS, mlp=ExpertsConfig(8, 2, 1)),) * 4),
                    "float32",
                    stacked=True,
                )
            },
            "mesh.stage is 4, and the model has experts: use the mesh axis expert",
        ),
    ],
)
def test_what_a_pipeline_cannot_train_is_refused_in_a_line(change, message):
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match=f"^{message}.*$") as error:
        refused(**{"model": model, "batch": batch, **change})
    assert "\n" not in str(error.value)
