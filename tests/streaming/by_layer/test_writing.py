"""Greedy continuations token by token on the host: those of `generate`, each row as far as it goes."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.by_layer.writing import write_layerwise
from tests.streaming.tiny_models import GQA, build

CACHE = sj.kv.preset("streaming_llm", sinks=2, window=9)
PROMPT = [[3, 1, 4, 1, 5], [9, 2, 6]]


def test_what_is_written_is_what_generate_writes_and_ends_where_it_should():
    model = build(GQA)
    _, plain = sj.generate(model, sj.init_state(model, CACHE, 2), PROMPT, max_new_tokens=6,
                           sampler=sj.Sampler(temperature=0))  # fmt: skip
    plain = np.asarray(plain).tolist()
    stop = plain[0][2]
    first = plain[0].index(stop) + 1
    state, found = write_layerwise(
        model, sj.init_state(model, CACHE, 2), PROMPT, max_new_tokens=6, stop_tokens=(stop,),
        enough=lambda row, tokens: row == 1 and len(tokens) == 4,
    )  # fmt: skip
    ends = min(plain[1].index(stop) + 1 if stop in plain[1] else 4, 4)
    assert found == [plain[0][:first], plain[1][:ends]]
    assert np.asarray(state.seen).tolist() == [5 + first, 3 + ends]


def test_what_is_not_finite_is_told():
    model = build(GQA)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, model)
    with pytest.raises(ValueError, match="logits are not finite"):
        write_layerwise(broken, sj.init_state(broken, CACHE, 2), PROMPT, max_new_tokens=2)
