"""Rows with adapters of their own compute what models with one of these adapters compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.lora.attaching import add_lora
from streamjax.models.lora.row_adapters import RowAdapters, factors_of, require_only_adapters
from tests.streaming.tiny_models import GQA, VOCAB, build

MODEL = build(GQA)


def adapted(rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> sj.Decoder:
    """The model with adapters that do something."""
    model, draw = add_lora(MODEL, rank, alpha, targets, jax.random.key(seed)), np.random.default_rng(seed)
    for block in model.layers:
        for target in targets:
            adapter = getattr(
                block.mlp if target in ("gate", "up", "down") else block.mixer.projections, f"{target}_lora"
            )
            adapter.b = adapter.b.replace(jnp.asarray(draw.normal(size=adapter.b.shape).astype(np.float32)))
    return model


MODELS = {
    None: MODEL,
    "all": adapted(3, 6.0, ("q", "k", "v", "o", "gate", "up", "down"), 1),
    "few": adapted(2, 1.0, ("q", "down"), 2),
}
KNOWN = {name: factors_of(model) for name, model in MODELS.items() if name is not None}
CACHE = sj.kv.preset("dense", capacity=16)


def logits(model: sj.Decoder, ids: np.ndarray) -> np.ndarray:
    return np.asarray(sj.step(model, sj.init_state(model, CACHE, len(ids)), jnp.asarray(ids))[1])


def test_every_row_has_its_own():
    ids = np.random.default_rng(0).integers(0, VOCAB, (4, 6))
    rows = RowAdapters(MODEL, KNOWN, 4)
    np.testing.assert_array_equal(logits(rows.model, ids), logits(MODEL, ids))
    for names in (["all", None, "few", "all"], ["few", "few", None, "all"]):
        for row, name in enumerate(names):
            rows.set(row, name)
        found = logits(rows.model, ids)
        for row, name in enumerate(names):
            expected = logits(MODELS[name], ids[row : row + 1])[0]
            np.testing.assert_allclose(found[row], expected, rtol=2e-4, atol=2e-4)


def test_what_is_merged_into_weights_is_no_adapter_of_a_row():
    require_only_adapters(MODEL, MODELS["few"], "few")
    with pytest.raises(ValueError, match="adapter 'x' changes weights of the model themselves"):
        require_only_adapters(MODEL, build(GQA, seed=1), "x")


def test_without_adapters_the_model_is_as_it_is():
    assert RowAdapters(MODEL, {}, 3).model is MODEL
