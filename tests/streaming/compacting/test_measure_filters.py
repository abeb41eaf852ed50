"""Q-Filters of a model at hand: measured, written to a file, taken by the preset, refused by another model."""

import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.scores.filter_file import QueryFilters
from tests.streaming.compacting.test_compact import LENGTH, SIZE, prompt  # noqa: F401
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens


def test_filters_choose_as_published(prompt, tmp_path):  # noqa: F811
    """By a singular value decomposition of all queries of the prompt, the sign of most; kept at compaction."""
    model, tokens, state, found = prompt
    measured, file = sj.measure_filters(model, tokens), tmp_path / "filters.safetensors"
    measured.save(file)
    assert QueryFilters.load(file) == measured
    caches = sj.kv.preset("qfilters", filters=str(file), window=4, size=SIZE, every=8)
    assert caches[0] != caches[1]
    new = sj.compact(model, state, caches)  # no queries are needed
    for (q, k, _), layer, own in zip(found, new.layers, measured.layers, strict=True):
        for head in range(2):
            mean = np.zeros(6)
            for h in (2 * head, 2 * head + 1):
                u, _, v = np.linalg.svd(q[:, :, h].reshape(-1, 6), full_matrices=False)
                mean += v[0] * (1 if np.mean(u[:, 0] > 0) > 0.5 else -1) / 2
            np.testing.assert_allclose(own.arrays[0][head], mean, atol=1e-4)
            for row in range(2):
                worth = k[row, : LENGTH - 4, head] @ mean
                kept = np.asarray(layer[1].slots.position)[row, head][np.asarray(layer[1].slots.valid)[row, head]]
                assert sorted(kept) == sorted(np.argsort(-worth)[:SIZE])


@pytest.mark.slow
def test_a_stream_reads_with_filters(prompt, tmp_path):  # noqa: F811
    model, tokens, _, _ = prompt
    sj.measure_filters(model, tokens).save(tmp_path / "filters.safetensors")
    caches = sj.kv.preset("qfilters", filters=str(tmp_path / "filters.safetensors"), window=4, size=SIZE, every=8)
    assert caches[0] != caches[1]
    assert caches[0].renumbered()[0] == caches[1].renumbered()[0]  # one program for both
    assert np.isfinite(sj.read(model, sj.init_state(model, caches), tokens[:1], 16).hidden).all()


@pytest.mark.quick
def test_what_is_no_filter_of_this_model_is_refused(tmp_path):
    model, other, file = build(GQA), build(GQA, seed=1), tmp_path / "filters.safetensors"
    sj.measure_filters(model, random_tokens(1, 8)).save(file)
    caches = sj.kv.preset("qfilters", filters=str(file))
    sj.init_state(model, caches)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for act, message in (
        (lambda: sj.init_state(other, caches), "measured with model [0-9a-f]{16}, and this one is [0-9a-f]{16}"),
        (lambda: sj.kv.preset("qfilters", filters=str(broken)), "broken.safetensors: no filters of queries could be"),
        (lambda: sj.kv.preset("qfilters", filters="nowhere.safetensors"), "nowhere.safetensors"),
        (lambda: sj.measure_filters(model, [[1]]), "filters need rows of one length, of at least two"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


def test_layers_with_windows_keep_them(tmp_path):
    model, file = build(LOCAL), tmp_path / "filters.safetensors"
    sj.measure_filters(model, random_tokens(1, 8)).save(file)
    first, second = sj.kv.preset("qfilters", filters=str(file), window=2, size=4, every=8)
    assert first == sj.kv.Cascade(sj.kv.Window(4))
    assert second.made_for is not None
