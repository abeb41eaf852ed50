"""Gates of heads: the gated model is what a cache makes of it, its gradient is right, useless heads lose their gate."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from pallas_kernels.patterns import SinkWindow
from streamjax.models import stack_layers
from streamjax.training.heads.gates import (
    GateConfig,
    answer_batches,
    far_layers,
    gate_loss,
    gated_hidden,
    optimise_gates,
)
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, build, random_tokens, with_sink_logits
from tests.training.gradient_checks import CONFIG, random_model

TOKENS = random_tokens(2, 19)
hidden = jax.jit(gated_hidden, static_argnames="near")
MIXED = LOCAL.replace(local_rope=None)  # a layer with a window, then one without


def gated_logits(model, gates, near):
    return model.logits(hidden(model, jnp.asarray(gates, jnp.float32), TOKENS, near))


def answers(rows, length):
    """Marks at drawn places, in one row none."""
    marks = np.random.default_rng(3).random((rows, length)) < 0.3
    marks[0] = False
    return marks


@pytest.mark.weekly("gqa")
@pytest.mark.parametrize(
    "config", [GQA.expand(), LOCAL.expand(), with_sink_logits(GQA)], ids=["gqa", "local", "sink-logits"]
)
def test_with_all_gates_open_the_model_is_as_pretrained(config):
    model = build(config)
    found = gated_logits(model, np.ones((2, 2)), SinkWindow(1, 4))
    np.testing.assert_allclose(found, sj.forward(model, TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "near", "windows"),
    [(ALIBI, SinkWindow(2, 5), (5, 5)), (MIXED, SinkWindow(0, 7), (5, 7))],
    ids=["alibi", "mixed"],
)
def test_with_all_gates_closed_every_layer_sees_sinks_and_a_window(config, near, windows):
    """In the mixed model the layer with a window of its own keeps it."""
    found = gated_logits(build(config), np.zeros((config.num_layers, config.num_kv_heads)), near)
    local = build(config.replace(windows=windows, sinks=near.sinks))
    np.testing.assert_allclose(found, sj.forward(local, TOKENS), atol=1e-5)
    assert np.abs(found - sj.forward(build(config), TOKENS)).max() > 0.1


def test_with_gates_of_0_and_1_the_model_is_what_the_cache_makes_of_it(tmp_path):
    gates, config = [[1.0, 0.0], [0.0, 1.0]], GateConfig(sinks=2, recent=3)
    (tmp_path / "gates.json").write_text(json.dumps({"gates": gates}))
    cache = sj.kv.preset("duo_attention", heads=str(tmp_path / "gates.json"), full=0.5, sinks=2, recent=3, capacity=32)
    model = build(GQA)
    _, streamed = sj.step(model, sj.init_state(model, cache, 2), TOKENS)
    np.testing.assert_allclose(gated_logits(model, gates, config.near), streamed, atol=1e-4)


def test_layouts_of_the_layers_agree():
    gates = np.array([[0.3, 0.8], [0.6, 0.1]])
    expected = gated_logits(build(GQA), gates, SinkWindow(1, 4))
    found = gated_logits(stack_layers(build(GQA)), gates, SinkWindow(1, 4))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("windows", [(), (6, None)], ids=["global", "mixed"])
def test_loss_and_gradient(windows):
    """The loss from the hidden states it is made of, and its gradient by central differences, in float64."""
    near, l1 = SinkWindow(1, 4), 0.05
    with jax.enable_x64(True):
        model = random_model(CONFIG.replace(windows=windows))
        tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 17)).astype(np.int32)
        batch = {"tokens": jnp.asarray(tokens), "answers": jnp.asarray(answers(3, 17))}
        gates = jnp.asarray(np.random.default_rng(2).uniform(0.2, 0.9, (2, 2)))
        measure = jax.jit(jax.value_and_grad(lambda gates: gate_loss(gates, model, batch, near, l1), has_aux=True))
        loss, gradient = measure(gates)

        full, gated = (hidden(model, x, tokens, near) for x in (jnp.ones_like(gates), gates))
        marks = np.asarray(batch["answers"])
        distance = np.sum(np.square(gated - full)[marks]) / np.sum(np.square(full)[marks])
        penalty = l1 * float(gates[1 if windows else slice(None)].mean())
        assert distance > 1e-4
        np.testing.assert_allclose(loss, (distance + penalty, distance), rtol=1e-12)
        for place in itertools.product(range(2), range(2)):
            up, down = (measure(gates.at[place].add(step))[0][0] for step in (1e-5, -1e-5))
            np.testing.assert_allclose(gradient[place], (up - down) / 2e-5, rtol=1e-6, atol=1e-12)
        assert not windows or not np.any(gradient[0])


def test_optimisation_closes_the_gates_of_useless_heads():
    """Heads whose output goes nowhere; the others move the hidden states, and keep their gates."""
    model = build(GQA)
    for layer, head in ((0, 1), (1, 0)):
        out = model.layers[layer].mixer.projections.out
        out[...] = out[...].at[head].set(0.0)
    batch = {"tokens": TOKENS, "answers": np.arange(19) > np.array([[12], [8]])}
    config = GateConfig(steps=60, learning_rate=0.05, sinks=1, recent=3)
    steps = list(optimise_gates(model, itertools.repeat(batch), config))
    assert len(steps) == 60
    assert float(steps[0].loss) == pytest.approx(config.l1)  # all gates are open, nothing moves
    assert float(steps[-1].loss) < 0.9 * config.l1
    gates = np.asarray(steps[-1].gates)
    np.testing.assert_array_equal(gates[[0, 1], [1, 0]], 0.0)
    assert gates[[0, 1], [0, 1]].min() > 0.7
    assert all(np.all((step.gates >= 0) & (step.gates <= 1)) for step in steps)


def test_layers_with_windows_have_closed_gates_throughout():
    batch = {"tokens": TOKENS, "answers": np.ones((2, 19), bool)}
    for step in optimise_gates(build(MIXED), itertools.repeat(batch), GateConfig(steps=3, sinks=1, recent=3)):
        assert not np.any(step.gates[0])
        assert np.all(step.gates[1] > 0.5)


@pytest.mark.quick
def test_the_learning_rate_rises_stays_and_falls():
    schedule = GateConfig(steps=100, learning_rate=0.02).schedule
    found = [float(schedule(step)) for step in (0, 10, 20, 50, 80, 90, 100)]
    np.testing.assert_allclose(found, [0.002, 0.011, 0.02, 0.02, 0.02, 0.011, 0.002], rtol=1e-5)
    assert all(0.002 <= float(GateConfig(steps=n).schedule(n - 1)) <= 0.02 for n in (1, 2, 3, 7))


@pytest.mark.quick
def test_batches_are_made_of_rows_that_have_answers():
    rows = [{"tokens": np.full(3, i, np.int32), "weights": np.array([0.02, i % 2, 0.5], np.float32)} for i in range(10)]
    found = list(itertools.islice(answer_batches(rows, 2, start=2), 2))
    np.testing.assert_array_equal(found[0]["tokens"], [[3] * 3, [5] * 3])
    np.testing.assert_array_equal(found[1]["tokens"], [[7] * 3, [9] * 3])
    np.testing.assert_array_equal(found[1]["answers"], [[False, True, False]] * 2)


@pytest.mark.quick
def test_what_cannot_be_optimised_is_refused():
    hsa = GQA.replace(windows=(5, 5), hsa=sj.HSAConfig(layers=(1,), memory_layers=(0,)))
    with pytest.raises(ValueError, match="the model reads a chunk memory"):
        far_layers(hsa.expand())
    with pytest.raises(ValueError, match="every layer of the model has a sliding window"):
        far_layers(GQA.replace(windows=(5, 5)).expand())
    with pytest.raises(ValueError, match="rows of 19 tokens: more are needed than 18 sinks and recent ones"):
        next(optimise_gates(build(GQA), [{"tokens": TOKENS}], GateConfig(sinks=2, recent=16)))
    empty = {"tokens": np.zeros(2, np.int32), "weights": np.full(2, 0.02, np.float32)}
    with pytest.raises(ValueError, match="rows of 2 tokens hold no question"):
        next(answer_batches([empty] * 1001, 1))
    with pytest.raises(ValueError, match=r"GateConfig\.recent is 0: it must be a whole number of at least 1"):
        GateConfig(recent=0)
    with pytest.raises(ValueError, match=r"GateConfig.l1 is -1: it must be a number of at least 0"):
        GateConfig(l1=-1)
