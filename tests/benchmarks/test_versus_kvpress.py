"""The comparison with kvpress: both sides know the same methods, and agreement is counted over heads."""

import ast
from types import SimpleNamespace

import numpy as np
import pytest

import streamjax as sj
from benchmarks.caches import versus_kvpress as versus
from benchmarks.caches.beside_kvpress.methods import METHODS, Sizes
from benchmarks.caches.beside_kvpress.ours import places
from streamjax.checkpoints.plain_json import to_json
from streamjax.evaluation.leaderboard_rows import read_rows


def test_both_sides_have_the_same_methods():
    """kvpress is not installed here: its side is read, not run."""
    tree = ast.parse((versus.SIDE.parent / "presses.py").read_text())
    (presses,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PRESSES"
    ]
    assert [key.value for key in presses.keys] == list(METHODS)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("qfilters", "think")])  # a file; all stay
def test_as_many_tokens_stay_as_are_asked_for(name):
    cache = METHODS[name](Sizes(200, 80))
    cascade = cache.cascade if isinstance(cache, sj.kv.Budgeted) else cache
    scored = [tier for tier in cascade.tiers if isinstance(tier, sj.kv.Scored)]
    assert cascade.slots - sum(tier.every for tier in scored) == 200
    assert all(tier.every >= 80 for tier in scored)  # none of the question's and the answer's tokens has to go


def test_agreement_is_a_mean_over_layers_and_heads():
    ours, theirs = [[[1, 2, 3], [4, 5]], [[1], [2]]], [[[1, 2, 9], [4, 5]], [[3], [2]]]
    assert versus.agreement(ours, theirs) == pytest.approx((2 / 3 + 1 + 0 + 1) / 4)


def test_rows_of_kvpress_stand_beside_those_of_the_leaderboard(tmp_path):
    examples = [{"task": task, "answers": ["12"], "answer_tokens": 4} for task in ("a", "a", "b")]
    said = {str(i): {"knorm 0.5": text} for i, text in enumerate(("12", "no", "is 12"))}
    row = versus.leaderboard_row({"examples": examples}, said, "knorm", 0.5)
    (tmp_path / "rows.json").write_text(to_json({"rows": [row]}))
    (found,) = read_rows(str(tmp_path / "rows.json"))
    assert found["label"] == "knorm kvpress 0.5.5"
    assert found["mean"] == (0.5 + 1.0) / 2
    assert versus.leaderboard_row({"examples": examples}, said, "knorm", 0.25) is None


def test_places_of_a_pool_are_those_of_each_head():
    tier = sj.kv.Pooled(2, sj.kv.KNorm(), every=1)
    slots = SimpleNamespace(
        position=np.array([[[5, 3, 9, 7]]], np.uint32),
        valid=np.array([[[True, False, True, False], [False, True, False, False]]]),
    )
    cache = SimpleNamespace(tiers=(tier,))
    assert places(cache, (SimpleNamespace(slots=slots),), 2) == [[5, 9], [3]]
