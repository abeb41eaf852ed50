"""Streams laid out anew for heads with rules of their own, and from one set of such rules to another."""

import numpy as np
import pytest

import streamjax as sj
from tests.streaming.tiny_models import GQA, build, random_tokens, read_stream

LENGTH = 40
FULL, NEAR = sj.kv.preset("dense", capacity=64), sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(5))
KNORM = sj.kv.Cascade(sj.kv.Window(4), sj.kv.Scored(8, sj.kv.KNorm(), every=4))
SNAP = sj.kv.Cascade(sj.kv.Window(6), sj.kv.Scored(7, sj.kv.SnapKV(6, 3), every=8))
GROUPS = sj.kv.HeadGroups(((1,), FULL), ((0,), NEAR))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (FULL, GROUPS),
        pytest.param(FULL, sj.kv.HeadGroups(((0,), KNORM), ((1,), FULL)), marks=pytest.mark.slow),
        pytest.param(
            GROUPS,
            sj.kv.HeadGroups(((0,), sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(3))), ((1,), KNORM)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dense", "scored", "groups"],
)
def test_heads_go_on_as_if_they_had_kept_that_all_along(before, after):
    """One layer, whose keys depend on their tokens alone; a choice by norms does not on what was chosen before."""
    model, tokens = build(GQA.replace(num_layers=1)), random_tokens(2, LENGTH + 8)
    _, expected = read_stream(model, sj.init_state(model, [after], batch_size=2), tokens, [LENGTH, 1])
    state = sj.read(model, sj.init_state(model, [before], batch_size=2), tokens[:, :LENGTH], 16)
    state = sj.compact(model, state, [after])
    assert state.caches == (after,)
    _, logits = read_stream(model, state, tokens[:, LENGTH:], [1])
    np.testing.assert_allclose(logits, expected[:, LENGTH:], atol=1e-4)


def test_queries_decide_for_each_group():
    """What a head keeps does not depend on how the others keep theirs."""
    model, tokens = build(GQA), random_tokens(2, LENGTH)
    state = sj.read(model, sj.init_state(model, FULL, batch_size=2), tokens, 16)
    alone = sj.compact(model, state, SNAP, tokens[:, -6:])
    mixed = sj.compact(model, state, [sj.kv.HeadGroups(((1,), SNAP), ((0,), FULL)), SNAP], tokens[:, -6:])
    own, theirs = alone.layers[0][1].slots, mixed.layers[0][0][1].slots
    np.testing.assert_array_equal(own.position[:, 1:], theirs.position)
    np.testing.assert_allclose(own.k[:, 1:], theirs.k, atol=1e-5)
    np.testing.assert_array_equal(mixed.layers[0][1][0].k[:, 0], state.layers[0][0].k[:, 0])


@pytest.mark.slow
def test_several_queries_decide_for_each_group():
    model, tokens = build(GQA), random_tokens(2, LENGTH)
    state = sj.read(model, sj.init_state(model, FULL, batch_size=2), tokens, 16)
    mixed = [sj.kv.HeadGroups(((1,), SNAP), ((0,), FULL)), SNAP]
    both = [tokens[:, :6], tokens[:, 6:12]]
    alone, mixed = (sj.compact(model, state, cache, queries=both) for cache in (SNAP, mixed))
    np.testing.assert_array_equal(alone.layers[0][1].slots.position[:, 1:], mixed.layers[0][0][1].slots.position)


@pytest.mark.quick
def test_groups_that_do_not_fit_are_refused():
    model = build(GQA.replace(num_layers=1))
    state = sj.init_state(model, [GROUPS])
    for cache, message in (
        ([FULL], "groups of heads hold different tokens: give each a cascade in HeadGroups, not"),
        ([sj.kv.HeadGroups(((0, 1), NEAR))], r"heads \[0, 1\] lie in several groups of the old cache"),
        ([sj.kv.HeadGroups(((0,), FULL), ((1,), sj.kv.Cascade(sj.kv.Scored(4, sj.kv.TOVA()))))], "give query="),
    ):
        with pytest.raises(ValueError, match=message) as error:
            sj.compact(model, state, cache)
        assert "\n" not in str(error.value)


def test_heads_that_shared_a_front_come_apart():
    """Each group goes on as `HeadGroups` of the same cascades, and into other ones."""
    model, tokens = build(GQA.replace(num_layers=1)), random_tokens(2, LENGTH + 8)
    front = sj.kv.Sink(2, reach=2**30), sj.kv.Window(5)
    far, near = sj.kv.Cascade(*front, sj.kv.Full(64)), sj.kv.Cascade(*front)
    before = sj.kv.SharedFront(2, ((1,), far), ((0,), near))
    after = sj.kv.HeadGroups(((1,), FULL), ((0,), near))
    state = sj.read(model, sj.init_state(model, [before], batch_size=2), tokens[:, :LENGTH], 16)
    _, expected = read_stream(model, sj.init_state(model, [after], batch_size=2), tokens, [LENGTH, 1])
    for cache, kept in ((after, after), (before, before.plain())):
        compacted = sj.compact(model, state, [cache])
        assert compacted.caches == (kept,)
        _, logits = read_stream(model, compacted, tokens[:, LENGTH:], [1])
        np.testing.assert_allclose(logits, expected[:, LENGTH:], atol=1e-4)
