"""Presets that read less than dense attention, told to read all of it, for every architecture that loads.

`quest`, `dhsa`, `sentence_kv` and `retro_infer` are in the files of their tiers, `rekv` in test_rekv.py. `inf_llm` as
published is never dense, as it moves what it stored (its rule has an oracle in kv/tiers/test_pages.py): here it is not.
"""

import numpy as np
import pytest

import streamjax as sj
from tests.architectures import CASES, changes_with_length, different_layers, tiny_config
from tests.streaming.tiny_models import build, random_tokens, read_stream

LENGTH = 28
ALIBI = ("falcon-alibi", "mpt")
QUICK = {("hip", "mpt"), ("lserve", "falcon-7b"), ("duo_attention", "gpt_neox")}
QUICK |= {("razor_attention", "phi3"), ("inf_llm", "gemma3")}
SIZES = {
    "hip": {"sinks": 2, "window": 3, "capacity": 32, "page": 4, "top_k": 9, "block": 3},
    "lserve": {"sinks": 2, "recent": 3, "capacity": 32, "page": 4, "logical": 2, "top_k": 9, "full": 1.0},
    "inf_llm": {
        "sinks": 2,
        "window": 3,
        "capacity": 32,
        "page": 4,
        "top_k": 8,
        "representatives": 2,
        "block": 3,
        "true_distance": True,
    },
    "duo_attention": {"sinks": 2, "recent": 3, "capacity": 40, "full": 1.0},
    "razor_attention": {"sinks": 2, "recent": 3, "capacity": 40, "full": 1.0},
}


@pytest.mark.usual("lserve-falcon-7b", "inf_llm-gemma3", "razor_attention-phi3", "hip-mpt")
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=() if (name, case) in QUICK else pytest.mark.slow)
        for name in SIZES
        for case in CASES
    ],
)
def test_with_everything_read_a_stream_is_dense(tmp_path, name, case):
    """Pages hold most of the stream when its last tokens are read; layers with windows of their own keep them."""
    config = different_layers(tiny_config(case))
    options = dict(SIZES[name])
    if name not in ("hip", "inf_llm"):
        heads = max(0 if block.mixer.recurrent else block.mixer.num_kv_heads for block in config.blocks)
        gates = np.linspace(0, 1, config.num_layers * max(heads, 1)).reshape(config.num_layers, -1)
        np.savetxt(tmp_path / "gates.tsv", gates, delimiter="\t")
        options["heads"] = str(tmp_path / "gates.tsv")
    model, tokens = build(config), random_tokens(1, LENGTH) % config.vocab_size
    cache = sj.kv.preset(name, **options)
    state = sj.init_state(model, cache)
    if name == "hip" and case in ALIBI:
        with pytest.raises(ValueError, match='ALiBi need search="all"'):
            sj.step(model, state, tokens)
        return
    span = state.span
    widths = [LENGTH - 1, 1] if name == "lserve" else [LENGTH // 2]
    _, found = read_stream(model, state, tokens, widths)
    if changes_with_length(config):  # which depends on the length of a sequence, and on the span of a cache
        _, expected = sj.step(model, sj.init_state(model, sj.kv.preset("dense", capacity=span)), tokens)
    else:
        expected = sj.forward(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
