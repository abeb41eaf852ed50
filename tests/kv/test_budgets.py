"""How a total is divided over layers: by formula, by what was measured, and from a file."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.kv import (
    Budgeted,
    Calibration,
    Cascade,
    Density,
    Important,
    KNorm,
    OverHeads,
    Pooled,
    Preferences,
    Prefixes,
    Pyramid,
    Scored,
    Sink,
    Uniform,
    Window,
    preset,
)
from streamjax.kv.budgets.budget import divided, in_levels

pytestmark = pytest.mark.quick
KEPT = Cascade(Sink(2), Window(3), Scored(10, KNorm(), every=4))


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=40),
    st.integers(0, 5000),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_whole_numbers_add_up_to_the_total(weights, more, most):
    weights, total = np.array([*weights, 1.0]), len(weights) + 1 + more
    sizes = np.array(divided(total, weights, most))
    assert sizes.sum() == total
    assert sizes.min() >= 1
    assert sizes.max() <= max(total if most is None else most, math.ceil(total / len(weights)))
    free = (sizes > 1) & (sizes < sizes.max())  # where no bound holds, sizes are in proportion, but for rounding
    if most is None and free.sum() > 1:
        scale = sizes[free].sum() / weights[free].sum()
        np.testing.assert_allclose(sizes[free], scale * weights[free], atol=1.0 + 1e-6 * total)
    order = np.argsort(weights, kind="stable")
    assert (np.diff(sizes[order]) >= -1).all()


def test_a_pyramid_is_the_published_line():
    """max(), min() and the step of the published code, which rounds the step down."""
    for layers, mean, beta in ((30, 928, 20.0), (32, 120, 10.0), (4, 64, 20.0)):
        least = mean // beta
        step = (2 * mean - least - least) / (layers - 1)
        sizes = Pyramid(beta).sizes(mean * layers, layers)
        assert sum(sizes) == mean * layers
        np.testing.assert_allclose(sizes, [2 * mean - least - i * step for i in range(layers)], atol=2.0)
    # where the first layer would keep more than there is, it keeps that, and the last as much more
    sizes = Pyramid().sizes(100 * 5, 5, most=150)
    assert (sizes[0], sizes[-1], sum(sizes)) == (150, 50, 500)
    assert Pyramid().sizes(7, 1) == (7,)


def test_a_pyramid_of_levels_keeps_what_the_line_keeps():
    line, levels = Pyramid().sizes(928 * 30, 30), Pyramid().sizes(928 * 30, 30, levels=3)
    assert len(set(levels)) == 3
    assert sum(line) - 10 < sum(levels) <= sum(line)
    for start in (0, 10, 20):
        assert levels[start : start + 10] == (round(sum(line[start : start + 10]) / 10),) * 10
    assert Pyramid().sizes(1000, 6, multiple=16, levels=3) == (288, 288, 160, 160, 48, 48)
    assert Pyramid().sizes(100, 4, levels=9) == Pyramid().sizes(100, 4)
    assert len({c.slots for c in Budgeted(KEPT, Pyramid(), distinct=2).for_layers(9)}) == 2
    assert len({c.slots for c in preset("ada_kv", pyramid=True).for_layers(30)}) == 3
    assert len({c.slots for c in preset("pyramid_kv", levels=0).for_layers(30)}) == 30


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
    st.integers(1, 4),
    st.sampled_from([1, 8]),
)
def test_levels_are_the_nearest_groups_and_keep_the_total(parts, levels, multiple):
    """Beside every way to cut the layers, in order of their sizes, into so many groups."""
    sizes = tuple(part * multiple for part in parts)
    found = in_levels(sizes, levels, multiple)
    if len(set(sizes)) <= levels:
        assert found == sizes
        return
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    ways = []
    for cuts in itertools.combinations(range(1, len(sizes)), levels - 1):
        groups = [order[a:b] for a, b in itertools.pairwise((0, *cuts, len(sizes)))]
        means = {i: sum(sizes[j] for j in group) / len(group) for group in groups for i in group}
        ways.append((sum((sizes[i] - mean) ** 2 for i, mean in means.items()), groups, means))
    least = min(ways)[0]
    groups, means = next(
        (groups, means) for cost, groups, means in ways
        if cost <= least + 1e-6 and all(len({found[i] for i in group}) == 1 for group in groups)
    )  # fmt: skip
    assert all(abs(found[i] - means[i]) <= multiple * len(sizes) for i in means)
    assert all(size % multiple == 0 and multiple <= size <= max(sizes) for size in found)
    left = sum(sizes) - sum(found)
    assert 0 <= left < multiple * max(map(len, groups))
    assert len(set(found)) <= levels


def test_sizes_of_prompts_come_from_a_short_list():
    """Whatever a prompt's layers weigh, what its programs are compiled for is an eighth of the mean, times a number."""
    shape, seen = (30, 2), set()
    for seed in range(20):
        table = np.random.default_rng(seed).uniform(0.5, 2, shape)
        measured = Calibration.from_table(table, Preferences(), "0123456789abcdef")
        cascades = dataclasses.replace(preset("cake", size=96), calibration=measured).for_layers(30)
        sizes = [c.tiers[-1].size for c in cascades]
        assert len(set(sizes)) <= 4
        assert 96 * 30 - 30 * 12 < sum(sizes) <= 96 * 30
        seen |= set(sizes)
    assert all(size % 12 == 0 for size in seen)
    assert preset("cake", levels=0).multiple == 1


def test_sizes_may_be_multiples():
    sizes = Pyramid().sizes(1000, 4, multiple=16)
    assert sum(sizes) == 62 * 16
    assert all(size % 16 == 0 for size in sizes)
    with pytest.raises(ValueError, match="a budget of 40 tokens for 4 layers: each needs at least 16"):
        Pyramid().sizes(40, 4, multiple=16)
    assert len({c.tiers[-1].size for c in Budgeted(KEPT, Pyramid(), multiple=5).for_layers(8)}) < 5


def test_preferences_are_products_of_powers():
    table = np.array([[4.0, 1.0], [16.0, 4.0], [1.0, 9.0]])
    sizes = Preferences(tau1=2.0, tau2=0.5).sizes(2000, 3, table)
    weights = [h**0.5 * v**2 for h, v in table]
    np.testing.assert_allclose(sizes, [2000 * w / sum(weights) for w in weights], atol=1.0)


def test_prefixes_hold_the_same_share():
    """One layer needs 3 tokens for what another one needs 6 for; the search finds the share that makes 9."""
    steep, even = np.cumsum([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]), np.cumsum([1 / 6] * 6)
    for total in range(2, 13):
        sizes = Prefixes().sizes(total, 2, np.stack((steep, even)))
        assert sum(sizes) == total
        found = [p for p in np.linspace(0, 1, 4001) if sum(np.searchsorted(c, p) + 1 for c in (steep, even)) == total]
        if found:
            assert sizes == tuple(int(np.searchsorted(c, found[0])) + 1 for c in (steep, even))


def test_layers_share_by_what_each_needs_by_itself():
    """Half of the attention is 1 of the first layer's tokens and 3 of the second's, 0.85 of it 4 and 6."""
    steep, even = np.cumsum([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]), np.cumsum([1 / 6] * 6)
    for held, needs in ((0.5, (1, 3)), (0.85, (4, 6))):
        sizes = Important(held).sizes(1000, 2, np.stack((steep, even)))
        np.testing.assert_allclose(sizes, [1000 * need / sum(needs) for need in needs], atol=1.0)
    calibration = Calibration.from_table(np.stack((steep, even)), Prefixes(), "0123456789abcdef")
    cascades = Budgeted(KEPT, Important(0.5), calibration).for_layers(2)
    assert [c.tiers[-1].size for c in cascades] == [5, 15]


def test_dense_layers_keep_more():
    table = np.array([[0.1], [0.7], [0.4]])
    weights = np.exp(-table[:, 0])
    np.testing.assert_allclose(Density().sizes(900, 3, table), 900 * weights / weights.sum(), atol=1.0)


def test_layers_get_cascades_of_their_sizes():
    cascades = Budgeted(KEPT, Pyramid()).for_layers(5)
    assert sum(c.tiers[-1].size for c in cascades) == 50
    assert [c.tiers[0].reach for c in cascades] == [c.slots for c in cascades]
    pools = Budgeted(KEPT, OverHeads(0.3, Pyramid())).for_layers(5)
    assert [c.tiers[-1] for c in pools] == [Pooled(c.tiers[-1].size, KNorm(), every=4, floor=0.3) for c in cascades]
    assert len(set(Budgeted(KEPT, Uniform()).for_layers(3))) == 1


def test_a_calibration_is_a_file(tmp_path):
    file = tmp_path / "cake.safetensors"
    measured = Calibration.from_table(np.array([[1.0, 2.0], [3.0, 4.0]]), Preferences(), "0123456789abcdef")
    measured.save(file)
    assert Calibration.load(file) == measured
    cache = preset("cake", calibration=str(file), size=10)
    assert not cache.unmeasured
    assert sum(c.tiers[-1].size for c in cache.for_layers(2)) == 20
    assert preset("d2o").slots == preset("d2o", calibration="").slots
    (tmp_path / "other").write_text("{}")
    for make, message in (
        (
            lambda: preset("prefix_kv", calibration=str(file)),
            "this calibration is by Preferences; Prefixes needs",
        ),
        (lambda: preset("cake", calibration=str(tmp_path / "none")), "none: no calibration of a budget could"),
        (
            lambda: preset("cake", calibration=str(tmp_path / "other")),
            "other: no calibration of a budget could",
        ),
        (lambda: cache.for_layers(3), "this calibration is of 2 layers, and the model has 3 that keep tokens"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused():
    for make, message in (
        (lambda: Budgeted(Cascade(Window(4)), Pyramid()), "a budget sets the size of a cascade's one Scored tier"),
        (lambda: Budgeted(KEPT, "pyramid"), "Budgeted.budget is 'pyramid': it must be Budget"),
        (lambda: Budgeted(KEPT, Preferences()).for_layers(4), "Preferences measures a model: give it a calibration"),
        (lambda: Pyramid().sizes(3, 4), "a budget of 3 tokens for 4 layers: each needs at least 1"),
        (lambda: divided(9, np.array([1.0, float("nan")])), "a budget's layers weigh \\[1.0, nan\\]"),
        (lambda: preset("cake", levels=-1), "levels is -1"),
        (lambda: Pyramid(beta=0), "Pyramid.beta is 0: it must be a number above 0"),
        (lambda: OverHeads(floor=1.5), "OverHeads.floor is 1.5: it must be a number from 0 to 1"),
        (lambda: preset("ada_kv", floor=-0.1), "floor is -0.1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
