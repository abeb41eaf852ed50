"""Streams of two groups, against a plain float64 model that is told each pair's distance and who sees whom."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.selective.other_group import OtherGroup
from streamjax.streaming.simultaneous import generate_while_reading, group_step, init_groups, read_group
from tests.covering import rest_slow
from tests.oracles.grouped_llama import PlainLlama
from tests.streaming.tiny_models import ALIBI, GQA, VOCAB, build

# chunks in the order in which they come; "s": source, "o": output
ORDER = [("s", 3), ("o", 1), ("o", 3), ("s", 3), ("s", 3), ("o", 1), ("o", 1), ("s", 3), ("o", 3)]
SINKS, READ, WRITTEN = 2, 5, 3


@pytest.fixture(scope="module")
def model():
    return build(GQA)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sj.save_hf(model, folder)
    return PlainLlama(folder)


def pairs(order, mutual, first, distance, sinks=0, read=10**6, written=10**6):
    """[T, T] distances and who sees whom, pair by pair, of chunks in this order; windows by group."""
    group = [name for name, count in order for _ in range(count)]
    chunk = [i for i, (_, count) in enumerate(order) for _ in range(count)]
    place, counts = [], {"s": 0, "o": 0}
    for name in group:
        place.append(counts[name])
        counts[name] += 1
    window, begins = {"s": read, "o": written}, {"s": 0, "o": first}
    apart, visible = np.zeros((len(group),) * 2, int), np.zeros((len(group),) * 2, bool)
    for i, mine in enumerate(group):
        for j, its in enumerate(group):
            here, there = begins[mine] + place[i], begins[its] + place[j]
            sink = its == "s" and place[j] < sinks
            reach = sinks + read
            if mine == its:
                visible[i, j] = j <= i and (sink or place[i] - place[j] <= window[its])
                apart[i, j] = min(place[i], reach) - place[j] if sink else here - there
            else:
                stored = sum(name == its for name, at in zip(group, chunk, strict=True) if at < chunk[i])
                visible[i, j] = place[j] < stored and (sink or place[j] >= stored - window[its])
                visible[i, j] &= mine == "o" or mutual
                if sink:
                    away = reach if place[i] >= reach else min(here, reach)
                    apart[i, j] = away - place[j]
                else:
                    near = here - (begins[its] + stored)
                    if distance is not None:
                        near = min(max(near, -distance), distance)
                    apart[i, j] = near + stored - place[j]
    return apart, visible


@pytest.mark.parametrize("kind", rest_slow(["dense", "sinks"], "sinks"))
def test_each_group_counts_for_itself(model, plain, kind):
    sinks = kind == "sinks"
    options = {"first_output": 4, "distance": 3, "mutual": True} if sinks else {"first_output": 2}
    source = sj.kv.Cascade(sj.kv.Sink(SINKS), sj.kv.Window(READ)) if sinks else sj.kv.preset("dense", capacity=16)
    output = sj.kv.Cascade(sj.kv.Window(WRITTEN)) if sinks else None
    groups = init_groups(model, source, output, 2, **options)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, sum(count for _, count in ORDER)))
    found, at = [], 0
    for name, count in ORDER:
        piece = tokens[:, at : at + count]
        groups, logits = group_step(model, groups, piece, "source" if name == "s" else "output")
        found.append(np.asarray(logits))
        at += count
    sizes = (SINKS, READ, WRITTEN) if sinks else ()
    mutual = options.get("mutual", False)
    distance, visible = pairs(ORDER, mutual, options["first_output"], options.get("distance"), *sizes)
    for row in range(2):
        want = plain.logits(tokens[row], distance, visible)
        np.testing.assert_allclose(np.concatenate(found, axis=1)[row], want, rtol=2e-3, atol=2e-3)
    assert [int(x) for x in (groups.source.seen[0], groups.output.seen[0])] == [12, 9]
    if sinks:  # and no buffer grows: a window, two sinks, and nothing of the other group
        again, _ = group_step(model, groups, tokens[:, :3], "output")
        assert again.cache_bytes == init_groups(model, source, output, 2, **options).cache_bytes


def test_waiting_reads_what_is_due_and_says_what_the_plain_model_says(model, plain):
    source, begin, asked = [5, 9, 2, 30, 7, 11, 8], [1, 3], []

    def pieces():
        for start in range(0, 7, 2):
            asked.append(start)
            yield source[start : start + 2]

    groups = init_groups(model, sj.kv.preset("dense", capacity=16), first_output=2)
    said, read = [], []
    for state, token in generate_while_reading(
        model, groups, pieces(), wait=3, between=2, begin=begin, max_new_tokens=4, sampler=sj.Sampler(temperature=0)
    ):
        said.append(token)
        read.append((int(state.source.seen[0]), len(asked), int(state.output.seen[0])))
    assert read == [(3, 2, 2), (5, 3, 3), (7, 4, 4), (7, 4, 5)]  # pieces are asked for when they are due
    order = [("s", 3), ("o", 2), ("s", 2), ("o", 1), ("s", 2), ("o", 1), ("o", 1)]
    tokens = np.array([*source[:3], *begin, *source[3:5], said[0], *source[5:], *said[1:3]])
    logits = plain.logits(tokens, *pairs(order, False, 2, None))
    assert said == logits[[4, 7, 10, 11]].argmax(-1).tolist()


def test_nonsense_is_one_line(model):
    dense = sj.kv.preset("dense", capacity=4)
    groups = init_groups(model, dense)
    greedy = sj.Sampler(temperature=0)

    def answer(**options):
        given = {"wait": 1, "begin": [1], "max_new_tokens": 2, "sampler": greedy, **options}
        return generate_while_reading(model, groups, [[1]], **given)

    for act, message in (
        (lambda: init_groups(model, sj.kv.preset("h2o")), "can be kept by Full, Window and Sink, not by Scored"),
        (lambda: init_groups(build(ALIBI), dense), "layer 0 has ALiBi"),
        (lambda: OtherGroup((sj.kv.Window(3),), apart=0), "OtherGroup.apart is 0"),
        (lambda: read_group(model, groups, [[1] * 5], "source"), "the cache holds 4 tokens"),
        (lambda: read_group(model, groups, [[VOCAB]], "source"), "token id 40"),
        (lambda: answer(begin=[]), "begin is empty"),
        (lambda: answer(wait=-1), "wait is -1: it must be at least 0"),
        (lambda: answer(max_new_tokens=6), "the cache holds 4 tokens"),
        (lambda: answer(sampler=None), "sampling needs a PRNG key"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


def test_rows_of_different_lengths_keep_their_places(model):
    """A row without tokens keeps its state bit for bit."""
    groups = init_groups(model, sj.kv.preset("dense", capacity=16), batch_size=2)
    groups = read_group(model, groups, [[1, 2, 3], [4]], "source")
    before = [np.array(x[1]) for x in jax.tree.leaves(groups)]
    groups = read_group(model, groups, [[5], []], "output")
    for x, y in zip(before, jax.tree.leaves(groups), strict=True):
        np.testing.assert_array_equal(x, y[1])
    assert groups.source.seen.tolist() == [3, 1]
    assert groups.output.seen.tolist() == [1, 0]
