"""What routers report of a step: their choices, counted token by token, and their losses; the same in every order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import streamjax as sj
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, ExpertsConfig, ModelConfig
from streamjax.models.lora.adapters import LoRAParam
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.mlps.routing_report import Report
from streamjax.training import OptimizerConfig, make_optimizer, make_train_step, new_state
from streamjax.training.backprop.routing import routing_metrics, take_reports, trainable_and_reports, with_reports
from tests.covering import rest_slow
from tests.training import gradient_checks

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
MLPS = (DenseConfig(12), ExpertsConfig(5, 2, 6))
STACKABLE = (ExpertsConfig(4, 2, 6),) * 2
ROWS, LENGTH = 2, 7


def setup(mlps, stacked=False):
    blocks = tuple(BlockConfig(mixer=ATTENTION, mlp=mlp) for mlp in mlps)
    config = ModelConfig(vocab_size=31, d_model=8, blocks=blocks)
    batch = gradient_checks.random_batch(31, ROWS, LENGTH)
    batch |= {"weights": np.ones((ROWS, LENGTH), np.float32), "targets": batch["tokens"]}
    return gradient_checks.random_model(config, "float32", stacked=stacked), batch


def counted(model, tokens):
    """Choices of each layer's experts, by numpy's count of what each router says of each token."""
    experts = jax.jit(choices_of)(model, tokens)
    count = {index: model.config.blocks[index].mlp.num_experts for index in experts}
    return {index: np.bincount(np.asarray(x).reshape(-1), minlength=count[index]) for index, x in experts.items()}


def choices_of(model, tokens):
    found, x = {}, model.embed(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.uint32), tokens.shape)
    context = SequenceContext(positions, None, tokens.shape[1])
    for index, block in enumerate(model.config.blocks):
        layer = model.layer(index)
        if isinstance(block.mlp, ExpertsConfig):
            mixed = x + layer.mixer.parallel(layer.mixer_norm(x), context)
            found[index], _ = layer.mlp.route(layer.mlp.logits(layer.mlp_norm(mixed)))
        x, _ = layer.parallel(x, context)
    return found


def reports_of(model, batch, **options):
    compute = partial(sj.training.loss_and_grad, trainable=trainable_and_reports(nnx.Param), **options)
    return take_reports(jax.jit(compute)(with_reports(model), batch)[1])


@pytest.mark.usual("options2-True")
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("options", "stacked"),
    [
        pytest.param({"method": "full"}, False, marks=pytest.mark.slow),
        pytest.param({"method": "remat"}, True, marks=pytest.mark.slow),
        ({"method": "layer", "chunk_size": 3, "grad_dtype": "bfloat16"}, True),
        ({"method": "chunk", "chunk_size": 3}, False),
    ],
)
def test_choices_are_counted_once(options, stacked):
    """Padding of the last chunk counts for nothing; what is computed again is not counted again."""
    model, batch = setup(STACKABLE if stacked else MLPS, stacked)
    grads, reports = reports_of(model, batch, **options)
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    expected = counted(model, batch["tokens"])
    assert reports.keys() == expected.keys()
    for index, choices in expected.items():
        report = Report.from_array(reports[index])
        np.testing.assert_array_equal(report.choices, choices)
        assert float(report.tokens) == ROWS * LENGTH


@pytest.mark.parametrize("kind", rest_slow(["microbatches", "stream", "adapters"], "microbatches"))
def test_a_step_tells_what_its_routers_did(kind):
    """The metrics of two microbatches, of streams and of adapters' training are those of the batch."""
    model, batch = setup(MLPS)
    _, reports = reports_of(model, batch)
    expected = routing_metrics(reports)
    loads = {f"expert_load/{i}": max(n) * len(n) / sum(n) for i, n in counted(model, batch["tokens"]).items()}
    assert {name: float(expected[name]) for name in loads} == pytest.approx(loads)
    assert float(expected["expert_load"]) == pytest.approx(max(loads.values()))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    stream = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), batch_size=ROWS)
    tuned = sj.add_lora(model, 1, 1.0, ("q",), jax.random.key(0))
    options, state = {
        "microbatches": ({"accumulation": 2}, new_state(model, optimizer)),
        "stream": ({"chunk_size": LENGTH}, new_state(model, optimizer, stream)),
        "adapters": ({"trainable": LoRAParam}, new_state(tuned, optimizer, None, LoRAParam)),
    }[kind]
    copy = jax.tree.map(jnp.copy, state)
    after, metrics = make_train_step(optimizer, **options)(copy, batch)
    assert jax.tree.structure(after.model) == jax.tree.structure(state.model)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
