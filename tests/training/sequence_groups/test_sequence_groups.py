"""Groups of devices for sequences of mixed lengths: the best plan by trying all, and equal gradients."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjax.models import UniformConfig
from streamjax.training import loss_and_grad
from streamjax.training.sequence_groups.costs import GroupCosts
from streamjax.training.sequence_groups.gradient import _row_length, grouped_loss_and_grad
from streamjax.training.sequence_groups.planning import Group, Plan, fixed_groups, plan_groups
from tests.training.gradient_checks import random_model

COSTS = GroupCosts(quadratic=1e-9, linear=2e-6, exchanged=1e-6, tokens_per_device=4096, far_exchanged=9e-6, near=2,
                   turn=1e-4)  # fmt: skip


def seconds(lengths, degree):
    """The formula of `GroupCosts`, term by term."""
    if not lengths:
        return 0.0
    alone = sum(1e-9 * n * n + 2e-6 * n for n in lengths) / degree
    exchanged = (1e-6 if degree <= 2 else 9e-6) * sum(lengths) * (degree - 1) / degree
    return alone + exchanged + (degree - 1) * 1e-4


def best(lengths, devices):
    """The time of the best of all divisions of the devices and of all ways to deal out the sequences."""
    divisions = {(devices,)}
    for division in list(divisions):
        todo = [division]
        while todo:
            now = todo.pop()
            for i, size in enumerate(now):
                if size > 1:
                    more = tuple(sorted((*now[:i], size // 2, size // 2, *now[i + 1 :])))
                    if more not in divisions:
                        divisions.add(more)
                        todo.append(more)
    found = float("inf")
    for division in divisions:
        for places in itertools.product(range(len(division)), repeat=len(lengths)):
            groups = [[n for n, place in zip(lengths, places, strict=True) if place == i] for i in range(len(division))]
            if all(sum(own) <= 4096 * size for own, size in zip(groups, division, strict=True)):
                found = min(found, max(seconds(own, size) for own, size in zip(groups, division, strict=True)))
    return found


def check(plan, lengths, devices):
    """A plan reads each sequence once, in groups that can hold them and share no device; its time is that of costs."""
    read, total = [], 0.0
    for groups in plan.rounds:
        used = [device for group in groups for device in range(group.first, group.first + group.degree)]
        assert len(used) == len(set(used))
        assert set(used) <= set(range(devices))
        assert all(group.first % group.degree == 0 for group in groups)
        own = [[lengths[number] for number in group.sequences] for group in groups]
        assert all(sum(some) <= 4096 * group.degree for some, group in zip(own, groups, strict=True))
        total += max(seconds(some, group.degree) for some, group in zip(own, groups, strict=True))
        read += [number for group in groups for number in group.sequences]
    assert sorted(read) == list(range(len(lengths)))
    assert plan.seconds == pytest.approx(total)


@given(st.lists(st.integers(1, 8000), min_size=1, max_size=5))
def test_a_plan_is_the_best_there_is(lengths):
    if sum(lengths) > 3 * 4096:  # so much fits into groups, however it falls
        lengths = [1 + n % 2400 for n in lengths]
    plan = plan_groups(lengths, 4, COSTS)
    check(plan, lengths, 4)
    if len(plan.rounds) == 1:
        assert plan.seconds == pytest.approx(best(lengths, 4), rel=2e-3)


def test_a_plan_of_many_sequences_beats_every_fixed_size():
    rng = np.random.default_rng(0)
    lengths = [*np.clip(np.exp(rng.normal(6.5, 1.3, 40)), 16, 8000).astype(int).tolist(), 16000]
    plan = plan_groups(lengths, 8, COSTS)
    check(plan, lengths, 8)
    assert len({group.degree for groups in plan.rounds for group in groups}) > 1
    for degree in (4, 8):  # the longest does not fit into fewer
        fixed = fixed_groups(lengths, 8, degree, COSTS)
        check(fixed, lengths, 8)
        assert plan.seconds < fixed.seconds


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match=r"^a sequence has 9000 tokens, and 2 devices hold 8192: cut it"):
        plan_groups([9000], 2, COSTS)
    with pytest.raises(ValueError, match=r"^6 devices: their number must be a power of two$"):
        plan_groups([1], 6, COSTS)
    with pytest.raises(ValueError, match=r"^groups of 3 devices: their size must divide 4$"):
        fixed_groups([1], 4, 3, COSTS)
    with pytest.raises(ValueError, match=r"^a sequence has no tokens"):
        plan_groups([0], 2, COSTS)


def test_costs_of_a_model_count_its_operations():
    config = UniformConfig(vocab_size=11, d_model=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, mlp_dim=8,
                           windows=(None, 16))  # fmt: skip
    found = GroupCosts.of_model(config, flops=1.0, bandwidth=1.0, tokens_per_device=8)
    assert found.quadratic == 6 * 4 * 2
    assert found.linear == 6 * config.parameter_count + 2 * 6 * 4 * 2 * 16
    assert found.exchanged == found.far_exchanged == 3 * 2 * (2 * 2 * 2)


@given(st.integers(1, 10**6), st.sampled_from([1, 2, 8]))
def test_rows_have_few_lengths(tokens, degree):
    length = _row_length(tokens, degree)
    assert tokens <= length <= max(16 * degree, 1.25 * tokens + degree)
    assert length % degree == 0
    assert _row_length(length, degree) == length


CONFIG = UniformConfig(vocab_size=23, d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12)


def test_groups_find_the_gradient_of_one_device():
    rng = np.random.default_rng(1)
    lengths = [50, 3, 9, 14, 1]
    with jax.enable_x64(True):
        model = random_model(CONFIG)
        sequences = []
        for length in lengths:
            tokens = rng.integers(0, 23, length + 1).astype(np.int32)
            sequences.append({"tokens": tokens[:-1], "targets": tokens[1:], "weights": rng.uniform(0.5, 2, length)})
        plan = Plan(((Group(0, 4, (0,)), Group(4, 1, (2, 1))), (Group(4, 1, (3, 4)),)), 1.0)
        found = grouped_loss_and_grad(model, sequences, plan, method="full")
        rows = {name: np.zeros((5, 50), x.dtype) for name, x in sequences[0].items()}
        for row, sequence in enumerate(sequences):
            for name, x in sequence.items():
                rows[name][row, : x.shape[0]] = x
        expected = loss_and_grad(model, rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6 if np.ndim(a) == 0 else 1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=r"^the plan is for 5 sequences, and 4 are given: make a new plan$"):
        grouped_loss_and_grad(model, sequences[:4], plan)
    with pytest.raises(ValueError, match=r"^the plan is for 5 devices, and there are 2: make a new plan$"):
        grouped_loss_and_grad(model, sequences, plan, devices=jax.devices()[:2])
