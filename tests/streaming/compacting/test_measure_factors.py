"""Low-rank factors of a model at hand: measured, written to a file, taken by the preset, refused by another model."""

import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.channels.factor_file import LayerFactors
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens, read_prompt


def test_factors_are_the_best_directions_and_a_stream_takes_them(tmp_path):
    file, (model, tokens, dense, _) = tmp_path / "factors.safetensors", read_prompt(48)
    measured = sj.measure_factors(model, tokens, most=1.0)
    measured.save(file)
    assert LayerFactors.load(file) == measured
    for layer, state in zip(measured.layers, dense.layers, strict=True):
        values = np.asarray(state[0].v, np.float64)[:, :, :48].transpose(0, 2, 1, 3).reshape(-1, 12)
        left = np.linalg.svd(values)[1]
        for rank in (1, 5):  # no basis leaves less
            basis = layer.array("v")[:, :rank].astype(np.float64)
            rest = np.sum((values - values @ basis @ basis.T) ** 2)
            np.testing.assert_allclose(rest, np.sum(left[rank:] ** 2), rtol=1e-3)
    whole = sj.kv.preset("cskv", factors=str(file), keys=1.0, values=1.0, window=4, capacity=64)
    assert whole[0] != whole[1]
    _, exact = sj.score(model, sj.init_state(model, sj.kv.preset("dense", capacity=64), batch_size=2), tokens, 16)
    for cache, near in (
        (whole, True),
        (sj.kv.preset("cskv", factors=str(file), keys=0.5, window=4, capacity=64), False),
    ):
        _, nats = sj.score(model, sj.init_state(model, cache, batch_size=2), tokens, 16)
        assert (np.abs(np.asarray(nats - exact)).max() < 1e-3) == near
        assert np.isfinite(nats).all()


@pytest.mark.quick
def test_what_are_no_factors_of_this_model_is_refused(tmp_path):
    model, other, file = build(GQA), build(GQA, seed=1), tmp_path / "factors.safetensors"
    sj.measure_factors(model, random_tokens(1, 8)).save(file)
    caches = sj.kv.preset("cskv", factors=str(file))
    sj.init_state(model, caches)
    sj.measure_filters(model, random_tokens(1, 8)).save(tmp_path / "filters.safetensors")
    for act, message in (
        (lambda: sj.init_state(other, caches), "measured with model [0-9a-f]{16}, and this one is [0-9a-f]{16}"),
        (
            lambda: sj.kv.preset("cskv", factors=str(tmp_path / "filters.safetensors")),
            "filters.safetensors: no factors of keys and values could be read: it has no low-rank factors",
        ),
        (lambda: sj.kv.preset("cskv", factors="nowhere.safetensors"), "nowhere.safetensors"),
        (lambda: sj.measure_factors(model, [[1]]), "factors need rows of one length, of at least two"),
        (lambda: sj.measure_factors(model, [[1, 2]]), "2 tokens have no 6 directions"),
        (lambda: sj.measure_factors(model, [[1, 2]], most=0), "most is 0: it must be a number above 0"),
        (
            lambda: sj.init_state(model, sj.kv.preset("cskv", factors=str(file), keys=0.9)),
            "the factors have 6 directions, and 10 are asked for",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


@pytest.mark.quick
def test_layers_with_windows_keep_them(tmp_path):
    model, file = build(LOCAL), tmp_path / "factors.safetensors"
    sj.measure_factors(model, random_tokens(1, 8)).save(file)
    first, second = sj.kv.preset("cskv", factors=str(file), window=2)
    assert first == sj.kv.Cascade(sj.kv.Window(4))
    assert second.made_for is not None
