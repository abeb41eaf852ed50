"""Log-probabilities of a batch against those from all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.training import token_log_probs
from tests.training.gradient_checks import CONFIG, largest_array, random_batch, random_model

MIXED = CONFIG.replace(num_layers=3, windows=(5, None, 5), sinks=1, vocab_size=401)


@pytest.mark.usual("True")
@pytest.mark.parametrize("stacked", [False, True])
def test_against_all_logits(stacked):
    """Packed rows, chunks and logits that are cut unevenly; tokens without weight may have any target."""
    with jax.enable_x64(True):
        model = random_model(MIXED, stacked=stacked)
        batch = random_batch(MIXED.vocab_size, 2, 17, packed=True)
        batch["weights"][batch["targets"] == -100] = 0.0
        program = jax.jit(lambda model, batch: token_log_probs(model, batch, chunk_size=6, logits_chunk=4))
        program = program.lower(model, batch).compile()
        assert largest_array(program) < batch["tokens"].size * MIXED.vocab_size
        places = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = np.asarray(sj.forward(model, batch["tokens"], **places))
        expected = np.take_along_axis(logits, np.maximum(batch["targets"], 0)[..., None], axis=-1)[..., 0]
        expected -= np.log(np.sum(np.exp(logits), axis=-1))
        found = program(model, batch)
    np.testing.assert_allclose(found, np.where(batch["weights"] == 0, 0.0, expected), rtol=0, atol=1e-11)
    assert found.dtype == jnp.float64


@pytest.mark.slow
def test_by_default_in_one_chunk(model, batch):
    weights = np.ones_like(batch["weights"])
    loss, _ = sj.training.loss_and_grad(model, batch | {"weights": weights})
    assert float(-jnp.mean(token_log_probs(model, batch | {"weights": weights}))) == pytest.approx(
        float(loss), rel=1e-6
    )


def test_errors_say_what_there_is(model, batch):
    with pytest.raises(ValueError, match="the batch has no 'weights'"):
        token_log_probs(model, {"tokens": batch["tokens"], "targets": batch["targets"]})
    with pytest.raises(ValueError, match="chunk_size is 13: use 1 to 12"):
        token_log_probs(model, batch, chunk_size=13)
    with pytest.raises(ValueError, match="target 61 at row 1, token 0: the vocabulary has 61 ids"):
        token_log_probs(model, batch | {"targets": np.full_like(batch["targets"], 61) * (np.arange(8) == 1)[:, None]})
