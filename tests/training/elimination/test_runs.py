"""Runs in which layers compute some tokens: predictors from the run's rows, going on, errors of one line."""

import dataclasses

import jax
import numpy as np
import pytest

from streamjax.training import LeMoConfig, apply_overrides, loss_and_grad, train
from streamjax.training.elimination.predictors_file import LayerPredictors
from tests.training.elimination.test_kept_tokens import drawn_file
from tests.training.gradient_checks import CONFIG, random_batch, random_model

pytestmark = pytest.mark.usefixtures("compilation_cache")


def small(run_config):
    lemo = LeMoConfig(share=0.5, block=8, steps=2, updates=2, width=4, channels=2)
    run_config = dataclasses.replace(run_config, model=run_config.model.replace(num_layers=1), eval_batches=1)
    return dataclasses.replace(run_config, steps=4, checkpoint_interval=2, eval_interval=4, lemo=lemo)


def test_a_run_that_goes_on_ends_with_the_same_bits(run_config, tmp_path):
    config = small(run_config)
    whole = train(config, tmp_path / "whole", progress=False)
    again = train(config, tmp_path / "whole", progress=False, resume_from=2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    file = tmp_path / "whole" / "predictors.safetensors"
    assert [layer.block for layer in LayerPredictors.load(file).layers] == [8]
    wrong = dataclasses.replace(config, lemo=dataclasses.replace(config.lemo, predictors=str(file), block=16))
    with pytest.raises(ValueError, match="is for blocks of 8 tokens"):
        train(wrong, tmp_path / "wrong", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lemo.block=7", "data.seq_len 32 is no multiple of lemo.block 7"),
        ("backprop.method=layer", "set backprop.method to 'remat' or 'full'"),
        ("mesh=auto", 'mesh "auto" does not go with it'),
        ("mesh.context=2", "mesh.context 2 does not go with it"),
        ("lemo.share=0.0", "LeMoConfig.share is 0"),
        ("diloco.replicas=2", "diloco.replicas computes all tokens"),
    ],
)
def test_what_does_not_go_together_is_one_line(run_config, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        apply_overrides(small(run_config), [tuple(change.split("="))])
    assert "\n" not in str(raised.value)


def test_rows_and_orders_that_cannot_choose_are_refused():
    model = random_model(CONFIG, "float32")
    elimination = drawn_file(np.float32).elimination(model, 0.5)
    with pytest.raises(ValueError, match="method 'chunk' cuts rows into chunks"):
        loss_and_grad(model, random_batch(CONFIG.vocab_size, 1, 8), "chunk", elimination=elimination)
    with pytest.raises(ValueError, match="rows of 9 tokens are no whole blocks of 4"):
        loss_and_grad(model, random_batch(CONFIG.vocab_size, 1, 9), elimination=elimination)
