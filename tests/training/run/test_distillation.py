"""Runs with a teacher: layers that learn from layers, a student that learns predictions, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.config import GatedDeltaConfig
from streamjax.models.conversion import convert_layers
from streamjax.training import Distillation, DistillConfig, OptimizerConfig, TrainConfig, apply_overrides, train
from streamjax.training.distillation.alignment import alignment_loss, alignment_loss_and_grad
from streamjax.training.distillation.teacher import examples, predictions
from tests.training.conftest import CONFIG
from tests.training.run.test_loop import Killed, at_step, kill, read_metrics, same_bits  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("compilation_cache")
DELTA = GatedDeltaConfig(num_heads=4, num_groups=4, key_dim=8, value_dim=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    sj.save_hf(jax.jit(lambda key: sj.Decoder(CONFIG.replace(vocab_size=259), key))(jax.random.key(4)), folder)
    return folder


@pytest.fixture
def aligning(run_config, teacher):
    """Six steps for the second layer of the teacher."""
    return TrainConfig(
        name="test",
        model=None,
        init_from=str(teacher),
        data=run_config.data,
        steps=5,
        objective=Distillation(matches="layers", top_k=8),
        distill=DistillConfig(teacher=str(teacher), layers=(1,), recurrent=DELTA),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
        log_interval=1,
        eval_interval=5,
        eval_batches=2,
        checkpoint_interval=3,
    )


def test_layers_first_and_then_predictions(aligning, teacher, at_step, tmp_path):  # noqa: F811
    """A killed run ends with the same bits; only converted layers change; both distances fall, and models load."""
    expected = train(aligning, tmp_path / "undisturbed")
    at_step(4, kill)
    with pytest.raises(Killed):
        train(aligning, tmp_path / "aligned")
    assert same_bits(train(aligning, tmp_path / "aligned"), expected)
    losses = [line["loss"] for line in read_metrics(tmp_path / "aligned") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    aligned, base = sj.load(tmp_path / "aligned" / "model", jnp.float32), sj.load(teacher, jnp.float32)
    assert aligned.config.blocks[1].mixer == DELTA
    for old, new in zip(jax.tree.leaves(base.layers[0]), jax.tree.leaves(aligned.layers[0]), strict=True):
        np.testing.assert_array_equal(old, new)
    changes = [("objective.matches", "predictions"), ("init_from", str(tmp_path / "aligned" / "model"))]
    taught = apply_overrides(aligning, [*changes, ("distill.trained", "all"), ("optimizer.learning_rate", "1e-3")])
    train(taught, tmp_path / "taught")
    lines = read_metrics(tmp_path / "taught")
    assert lines[-1]["eval_distance"] < next(line["loss"] for line in lines)
    assert sj.load(tmp_path / "taught" / "model").config == aligned.config


def test_alignment_is_the_share_of_the_teachers_square(model, batch):
    """Of each layer's own mixer, on the teacher's input to it; and no gradient reaches another part."""
    student, batch = convert_layers(model, (0, 1), recurrent=DELTA), jax.tree.map(jnp.asarray, batch)
    inputs, outputs = examples(model, batch, (0, 1))
    np.testing.assert_allclose(inputs[:, 0], model.embed(batch["tokens"]), atol=1e-6)
    taught = batch | {"layer_inputs": inputs, "layer_outputs": outputs}
    assert float(alignment_loss(model, taught, (0, 1))) == pytest.approx(0, abs=1e-10)
    counted, shares = batch["weights"] > 0, []
    mix = jax.jit(lambda block, x: block.mixer.recur(block.mixer_norm(x), block.mixer.empty(8, jnp.float32))[0])
    for place, block in enumerate(student.layers):
        made = mix(block, inputs[:, place])
        wrong = np.square(made - outputs[:, place])[counted].sum()
        shares.append(wrong / np.square(outputs[:, place])[counted].sum())
    loss, grads = alignment_loss_and_grad(student, taught, (0, 1))
    assert float(loss) == pytest.approx(np.mean(shares), rel=1e-4)
    assert not np.any(grads.embedding[...])
    assert not any(np.any(leaf) for block in grads.layers for leaf in jax.tree.leaves(block.mlp))
    assert all(np.any(leaf) for block in grads.layers for leaf in jax.tree.leaves(block.mixer))


def test_predictions_are_the_likeliest_tokens(model, batch):
    ids, logp = predictions(model, jax.tree.map(jnp.asarray, batch), 5, logits_chunk=7)
    expected = jax.nn.log_softmax(sj.forward(model, batch["tokens"]))
    best = np.argsort(-expected, axis=-1)[..., :5]
    np.testing.assert_allclose(logp, np.take_along_axis(np.asarray(expected), best, -1), atol=1e-5)
    np.testing.assert_array_equal(ids, best)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("distill.teacher", "none")], "set distill.teacher to its folder"),
        ([("distill.layers", "()")], "set distill.layers"),
        ([("distill.layers", "(1, 0)")], "DistillConfig.layers must name layers in order, got (1, 0)"),
        ([("distill.layers", "(2,)")], "layers names layer 2 of a model that has 2"),
        ([("distill.recurrent", "none")], "set recurrent or window"),
        ([("objective.top_k", "400")], "config.objective.top_k is 400: the vocabulary has 259 ids"),
        ([("lora.rank", "2")], "distill.layers are trained themselves: set lora.rank to 0, not 2"),
        (
            [("backprop.carry_state", "true"), ("data.packing", "streams")],
            "has a teacher that reads whole rows, and backprop.carry_state reads streams",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(aligning, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        train(apply_overrides(aligning, changes), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_teacher_of_another_width_is_refused(aligning, tmp_path):
    narrow = CONFIG.replace(vocab_size=259, d_model=16, num_layers=1)
    sj.save_hf(jax.jit(lambda key: sj.Decoder(narrow, key))(jax.random.key(0)), tmp_path / "narrow")
    other = dataclasses.replace(aligning.distill, teacher=str(tmp_path / "narrow"))
    with pytest.raises(ValueError, match=r"has d_model 16, and the student 32: they must be the same"):
        train(dataclasses.replace(aligning, distill=other), tmp_path / "run")
