"""`sj.kv.sized`: the largest cache of a preset that a number of bytes allows, and no larger one."""

import dataclasses

import pytest

import streamjax as sj
from streamjax.kv.codecs.codec import _shapes
from streamjax.kv.codecs.integers import IntByToken
from tests.streaming.tiny_models import GQA, build

_UNSIZED = ("hsa", "long_mem", "minicache", "xkv")  # the model has no memory of its own; no stream begins with the last
QUICK = ("streaming_llm", "h2o", "lagkv", "quest")


@pytest.fixture(scope="module")
def model():
    return build(GQA)


def presets():
    return [name for name, entry in sj.kv.presets().items() if name not in _UNSIZED and not entry.needs]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in presets()]
)
def test_every_preset_is_as_large_as_the_bytes_allow(model, name):
    budget = 3.1e5
    options = {"window": 64} if name == "inf_llm" else {}
    cache = sj.kv.sized(name, model, budget, **options)
    if isinstance(cache, sj.kv.Budgeted) and cache.unmeasured:
        cache = cache.cascade  # in layers of one size
    assert sj.init_state(model, cache).cache_bytes <= budget
    left = budget - sj.kv.describe(cache, model).total
    if {"capacity", "group"} & set(sj.kv.presets()[name].options):  # in pages or groups, which have to divide it
        assert left < 0.25 * budget
    else:
        slot = 2 * (2 * 2 * 6 * 4 + 2 * 4 + 8)  # keys and values of two layers, what may be noted of them, positions
        entry = sj.kv.presets()[name]  # a step makes all that it scales larger, in proportion
        assert (
            left < (1 + sum(entry.options[scaled] / entry.options[entry.scales[0]] for scaled in entry.scales)) * slot
        )


def test_a_cache_that_does_not_grow_with_a_model_is_refused(model):
    """The bank of `long_mem` is its side network's, and there is none."""
    with pytest.raises(ValueError, match="cache 'long_mem' takes 103 kB with this model, however large it is made"):
        sj.kv.sized("long_mem", model, 3.1e5)


def test_a_codec_is_traced_once_for_all_layers_and_sizes(model, monkeypatch):
    """Keys and values: more would be most of the time that a leaderboard takes to find its sizes."""
    traced, encode = [], IntByToken.encode

    def counted(self, x, role, *tables):
        traced.append(role)
        return encode(self, x, role, *tables)

    monkeypatch.setattr(IntByToken, "encode", counted)
    _shapes.cache_clear()
    cache = sj.kv.sized("knorm", model, 1e5, codec="int4")
    assert sj.init_state(model, cache).cache_bytes <= 1e5
    assert sorted(traced) == ["k", "v"]


def test_parts_that_grow_keep_their_proportion(model):
    cache = sj.kv.sized("h2o", model, 3e5, every=8)
    window, scored = cache.tiers
    assert abs(window.size / scored.size - 512 / 448) < 0.02
    assert scored.every == 8
    only = sj.kv.sized("h2o", model, 3e5, window=16)
    assert only.tiers[0].size == 16
    assert dataclasses.replace(only.tiers[1], size=1) == sj.kv.preset("h2o", window=16, size=1).tiers[1]


@pytest.mark.parametrize(
    ("name", "budget", "options", "message"),
    [
        ("snapky", 1e6, {}, "unknown cache preset 'snapky'; did you mean 'snapkv'"),
        ("snapkv", 1e3, {}, "cache 'snapkv' takes .* at least with this model, and the budget is 1 kB"),
        ("window", 1e6, {"window": 3}, "cache 'window' has no size left to find: do not give window"),
        ("snapkv", 1e6, {"every": 4}, "SnapKV.window is 32, but the tier makes room after every 4 tokens"),
        ("snapkv", 1e6, {"sinks": 4}, "cache preset 'snapkv' has no option 'sinks'"),
        ("hsa", 1e6, {}, "which the model does not have"),
    ],
)
def test_bad_input_is_one_line(model, name, budget, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        sj.kv.sized(name, model, budget, **options)
    assert "\n" not in str(caught.value)
