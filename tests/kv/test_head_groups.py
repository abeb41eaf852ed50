"""Heads that cache by different rules: each is as if it were alone, and files of gates are read or refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv import Cascade, Full, HeadGroups, KVSpec, Pages, Sink, Window
from streamjax.kv.head_groups import far_heads, read_gates
from tests.kv.tier_streams import FREQUENCIES, SLOPES, WIDTH, Stream, run
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, PARTIAL, build, random_tokens

SINK_LOGITS = (0.3, -0.8, 1.1, 0.2)


def alone(cascade, stream, head, counts, slopes, frequencies):
    """One key head and its two query heads, run in a layer of their own."""
    q = slice(2 * head, 2 * head + 2)
    mine = Stream(stream.q[:, :, q], stream.k[:, :, [head]], stream.v[:, :, [head]])
    slopes = None if slopes is None else slopes[q]
    known = {"slopes": slopes, "frequencies": frequencies, "sink_logits": SINK_LOGITS[q]}
    return run(cascade, mine, counts, **known, key_heads=1)[0]


@pytest.mark.parametrize(
    ("order", "slopes", "frequencies"),
    [
        pytest.param(((0,), (1,)), None, FREQUENCIES, id="in-order-rope", marks=pytest.mark.slow),
        pytest.param(((1,), (0,)), SLOPES, None, id="crossed-alibi"),
        pytest.param(((1, 0), ()), None, FREQUENCIES, id="one-group-crossed-rope", marks=pytest.mark.slow),
    ],
)
def test_every_head_is_as_if_alone(order, slopes, frequencies):
    rules = Cascade(Sink(1), Window(3), Pages(2, 8, 2)), Cascade(Sink(2), Window(4))
    stream = Stream.drawn(2, 30)
    groups = HeadGroups(*zip(order, rules, strict=True))
    known = {"slopes": slopes, "frequencies": frequencies, "sink_logits": SINK_LOGITS}
    found, state = run(groups, stream, [7, 1], **known)
    for heads, rule in zip(order, rules, strict=True):
        for head in heads:
            expected = alone(rule, stream, head, [7, 1], slopes, frequencies)
            np.testing.assert_allclose(found[:, :, 2 * head : 2 * head + 2], expected, atol=1e-5)
    expected = [rule.slots for rule, heads in zip(rules, order, strict=True) if heads]
    assert [slots for slots, _ in groups.sizes(state)] == expected


def test_what_ends_first_ends_the_layer():
    far, near = Cascade(Full(50)), Cascade(Sink(1), Window(3))
    groups = HeadGroups(((1,), far), ((0,), near))
    assert (groups.capacity, groups.slots, groups.span, groups.reach) == (50, 50, 50, None)
    assert HeadGroups(((0,), near), ((1,), Cascade(Window(5)))).reach == 5
    assert HeadGroups(((0, 1), near), ((), far)) == HeadGroups(((0, 1), near))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param("duo_attention", LOCAL, id="duo_attention-windows", marks=pytest.mark.slow),
        pytest.param("lserve", ALIBI, id="lserve-alibi"),
        pytest.param("duo_attention", PARTIAL, id="duo_attention-partial", marks=pytest.mark.slow),
        pytest.param("lserve", GQA, id="lserve-gqa", marks=pytest.mark.slow),
    ],
)
def test_with_all_heads_far_a_preset_is_dense(tmp_path, name, config):
    gates = np.linspace(0, 1, config.num_layers * config.num_kv_heads).reshape(config.num_layers, -1)
    np.savetxt(tmp_path / "gates.tsv", gates, delimiter="\t")
    sizes = {"capacity": 48} if name == "duo_attention" else {"capacity": 48, "page": 4, "logical": 2, "top_k": 13}
    cache = sj.kv.preset(name, heads=str(tmp_path / "gates.tsv"), full=1.0, sinks=2, recent=3, **sizes)
    model, tokens = build(config), random_tokens(1, 40)
    state, first = sj.step(model, sj.init_state(model, cache), tokens[:, :39])
    _, last = sj.step(model, state, tokens[:, 39:])
    np.testing.assert_allclose(np.concatenate((first, last), 1), sj.forward(model, tokens), atol=1e-4)


@pytest.mark.slow
def test_a_stream_with_half_of_its_heads_far_goes_on(tmp_path):
    """The far heads keep the first token of interest, the near ones do not; the state keeps its size."""
    (tmp_path / "gates.json").write_text('{"gates": [[0.9, 0.1], [0.2, 0.8]]}')
    sizes = {"sinks": 1, "recent": 3, "capacity": 16, "page": 4, "logical": 4, "top_k": 2}
    cache = sj.kv.preset("lserve", heads=str(tmp_path / "gates.json"), **sizes)
    assert [[heads for heads, _ in layer.groups] for layer in cache] == [[(0,), (1,)], [(1,), (0,)]]
    model = build(GQA)
    state = sj.init_state(model, cache)
    size = state.cache_bytes
    state, nll = sj.score(model, state, random_tokens(1, 100), 8)
    assert state.cache_bytes == size
    assert np.isfinite(nll).all()


@pytest.mark.quick
def test_shares_of_heads_are_those_with_the_largest_gates():
    gates = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    assert far_heads(gates, 0.5) == [([1, 2], [0]), ([0], [1, 2])]
    assert far_heads(gates, 0.0) == [([], [0, 1, 2])] * 2
    assert far_heads(gates, 1.0) == [([0, 1, 2], [])] * 2
    assert far_heads(np.zeros((1, 4)), 0.5) == [([0, 1], [2, 3])]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "none.json: no gates of heads could be read: .*this file is missing"),
        ("a.json", "{}", "a.json: no gates of heads could be read: it lacks 'gates'"),
        ("b.json", "[", "b.json: no gates of heads could be read"),
        ("c.json", '{"gates": [[1], [1, 2]]}', "c.json: no gates of heads could be read"),
        ("d.tsv", "1\tx", "d.tsv: no gates of heads could be read"),
        ("e.json", '{"gates": [1, 2]}', "e.json: gates must be a table of numbers"),
    ],
)
def test_a_file_without_gates_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_gates(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.quick
def test_what_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"each of the key heads 0, 1, ... in one group, got \[0, 2\]"):
        HeadGroups(((0, 2), Cascade(Window(3))))
    with pytest.raises(ValueError, match="needs a file of head gates"):
        sj.kv.preset("duo_attention")
    groups = HeadGroups(((0, 1, 2), Cascade(Window(3))))
    with pytest.raises(ValueError, match="HeadGroups places 3 key heads, the model's layers have 2"):
        groups.init(KVSpec(1, 2, WIDTH, jnp.dtype(jnp.float32)))
    (tmp_path / "gates.json").write_text('{"gates": [[0.9, 0.1]]}')
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        sj.init_state(build(GQA), sj.kv.preset("duo_attention", heads=str(tmp_path / "gates.json")))
