"""One token for all that were dropped, against the mean written out in float64, token by token and in chunks."""

import numpy as np
import pytest

import streamjax as sj
from streamjax.kv import Cascade, Compensation, Full, HeadGroups, Sink, Window
from tests.kv.tier_streams import FREQUENCIES, HEADS, KEY_HEADS, SCALE, SLOPES, Stream, run
from tests.oracles.pages import Rule
from tests.streaming.tiny_models import GQA, build, random_tokens


def by_means(stream, sinks, window, slopes, frequencies, cut):
    """What falls out of the window leaves when its chunk of `cut` tokens ends, as in any cascade with a later tier."""
    rule = Rule(KEY_HEADS, sinks, window, 1, 1, 1, None, SCALE, slopes, frequencies)
    out = np.zeros_like(stream.q)
    for row in range(len(stream.q)):
        for i in range(stream.q.shape[1]):
            before = i // cut * cut
            dropped = range(sinks, max(before - window, sinks))
            seen = [j for j in range(i + 1) if j not in dropped]
            for h in range(HEADS):
                head = h * KEY_HEADS // HEADS
                k, v, q = stream.k[row, :, head], stream.v[row, :, head], stream.q[row, i, h]
                logits, values = [rule.logit(h, q, i, k[j], j, False) for j in seen], [v[j] for j in seen]
                if dropped:
                    mean = np.mean([rule.turned(k[j], j) for j in dropped], axis=0)
                    bias = 0.0 if slopes is None else slopes[h] * (i - round(float(np.mean(dropped)), 9))
                    logits.append(SCALE * rule.turned(q, i) @ mean - bias + np.log(len(dropped)))
                    values.append(np.mean([v[j] for j in dropped], axis=0))
                weights = np.exp(np.array(logits) - max(logits))
                out[row, i, h] = weights @ np.array(values) / weights.sum()
    return out


@pytest.mark.covering
@pytest.mark.parametrize("cut", [1, 5])
@pytest.mark.parametrize("positions", ["none", "alibi", "rope"])
def test_dropped_tokens_are_one(cut, positions):
    slopes = SLOPES if positions == "alibi" else None
    frequencies = FREQUENCIES if positions == "rope" else None
    stream = Stream.drawn(2, 40)
    cascade = Cascade(Sink(2, reach=10**6), Window(6), Compensation())
    found, state = run(cascade, stream, [cut], slopes=slopes, frequencies=frequencies)
    expected = by_means(stream, 2, 6, slopes, frequencies, cut)
    if positions == "alibi":  # the mean's place is a whole position: half a step is up to exp(slope / 2) off
        np.testing.assert_allclose(found[:, :, 3], expected[:, :, 3], atol=0.02)
        np.testing.assert_allclose(state[2].age[:, 0, 0], 33 - np.mean(np.arange(2, 34)), rtol=1e-5)
    else:
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert state[2].count.tolist() == [40 - 2 - 6] * 2


def test_padding_and_the_wrap_of_positions_change_nothing():
    stream = Stream.drawn(2, 40, seed=1)
    cascade = Cascade(Sink(2, reach=10**6), Window(6), Compensation())
    expected, _ = run(cascade, stream, [5], slopes=SLOPES)  # as above
    found, _ = run(cascade, stream, [5], width=8, start=2**32 - 17, slopes=SLOPES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_preset_keeps_all_where_heads_retrieve(tmp_path):
    (tmp_path / "gates.json").write_text('{"gates": [[0.9, 0.1]]}')
    name, sizes = str(tmp_path / "gates.json"), {"sinks": 1, "recent": 3, "capacity": 40}
    cache = sj.kv.preset("razor_attention", heads=name, full=0.5, **sizes)
    short = Cascade(Sink(1, reach=2**30), Window(3), Compensation())
    assert cache[0] == HeadGroups(((0,), Cascade(Full(40))), ((1,), short))
    model, tokens = build(GQA.replace(num_layers=1)), random_tokens(1, 40)
    whole = sj.kv.preset("razor_attention", heads=name, full=1.0, **sizes)
    _, logits = sj.step(model, sj.init_state(model, whole), tokens)
    np.testing.assert_allclose(logits, sj.forward(model, tokens), atol=1e-4)
    state = sj.init_state(model, cache)
    state, nll = sj.score(model, state, tokens, 8)
    assert np.isfinite(nll).all()
