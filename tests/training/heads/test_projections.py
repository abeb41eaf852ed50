"""Directions of heads that are trained and cut: against folded weights, plain loops, and streams that keep them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.channels.projection_file import HeadProjections, Projections
from streamjax.training.heads.projections import (
    ProjectionConfig,
    as_file,
    principal_bases,
    projected_hidden,
    projection_loss,
    search_ranks,
    train_projections,
    turned_bases,
)
from tests.kv.tier_streams import FREQUENCIES, Stream, run
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens

TOKENS = random_tokens(2, 24)
STEPS = 24


@pytest.fixture(scope="module")
def model():
    return build(GQA)


@pytest.fixture(scope="module")
def first(model):
    return principal_bases(model, TOKENS)


@pytest.fixture(scope="module")
def trained(model, first):
    config = ProjectionConfig(steps=STEPS, learning_rate=0.03, levels=3, distilled=1.0)
    return list(train_projections(model, first[0], [TOKENS] * STEPS, config))


hidden = jax.jit(projected_hidden)
whole_hidden = jax.jit(lambda model: model.hidden(jnp.asarray(TOKENS)))


def test_matrices_turn_as_cayley_says_without_a_solver():
    """Value and slope against float64; `jnp.linalg.solve` of several layers did not return on CPUs."""
    draw = np.random.default_rng(0)
    x, way, push = (draw.normal(size=(2, 3, 16, 16)) for _ in range(3))
    basis = np.linalg.qr(draw.normal(size=x.shape))[0]
    x *= 0.5

    def plain(x):
        skew, one = x - x.swapaxes(-1, -2), np.eye(16)
        return basis @ np.linalg.solve(one - skew / 2, one + skew / 2)

    @jax.jit
    def slope(x):
        def turned(x):
            found = turned_bases({0: jnp.asarray(basis, jnp.float32)}, {0: x})[0]
            return jnp.sum(found * way), found

        return jax.value_and_grad(turned, has_aux=True)(x)

    (_, found), slopes = slope(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, plain(x), atol=2e-6)
    want = ((plain(x + 1e-6 * push) - plain(x - 1e-6 * push)) / 2e-6 * way).sum()
    assert (np.asarray(slopes, np.float64) * push).sum() == pytest.approx(want, rel=1e-4)
    assert "lapack" not in slope.lower(jnp.asarray(x, jnp.float32)).as_text()


def drawn_ranks(seed=0):
    return {i: np.random.default_rng(seed + i).integers(1, 7, (2, 2)) for i in range(2)}


def folded(bases, ranks):
    """The model whose own projections of keys and values end in those directions: no norm or bias is behind them."""
    model = build(GQA)
    for i in range(2):
        kernel = model.layer(i).mixer.projections.qkv
        weights = np.array(kernel[...], np.float64)
        for role, head in np.ndindex(2, 2):
            some = np.asarray(bases[i][role, head], np.float64)[:, : ranks[i][role, head]]
            weights[:, head, role - 2] = weights[:, head, role - 2] @ some @ some.T
        kernel[...] = jnp.asarray(weights, jnp.float32)
    return model


def test_heads_in_some_directions_are_a_model_with_other_weights(model, first):
    bases, bounds = first
    assert bounds == [None, None]
    ranks = drawn_ranks()
    found = hidden(model, bases, ranks, TOKENS)
    np.testing.assert_allclose(found, whole_hidden(folded(bases, ranks)), atol=2e-4)
    k = model.layer(0).mixer.projections.keys(model.layer(0).mixer_input(model.embed(jnp.asarray(TOKENS))))[0]
    for head in range(2):  # the principal ones are numpy's singular vectors
        directions = np.linalg.svd(np.asarray(k, np.float64)[:, :, head].reshape(-1, 6))[2]
        np.testing.assert_allclose(np.abs(directions @ np.asarray(bases[0][0, head])), np.eye(6), atol=1e-3)


def test_training_keeps_matrices_orthogonal_and_brings_the_model_nearer(model, first, trained):
    for layer in trained[-1].bases.values():
        product = np.einsum("nkdr,nkds->nkrs", *[np.asarray(layer)] * 2)
        np.testing.assert_allclose(product, np.broadcast_to(np.eye(6), product.shape), atol=1e-4)
    loss = jax.jit(projection_loss)

    def divergence(bases):
        """At ranks that every head may have been drawn with."""
        zero = {i: jnp.zeros_like(x) for i, x in bases.items()}
        some = [{i: np.full((2, 2), rank) for i in range(2)} for rank in (2, 4)]
        return sum(float(loss(zero, bases, model, ranks, jnp.asarray(TOKENS), 1.0)) for ranks in some)

    assert divergence(trained[-1].bases) < 0.9 * divergence(first[0])


def test_a_search_takes_from_heads_that_move_the_model_least(model, first):
    """Round by round with folded weights: three levels of two channels, two heads of eight lose one together."""
    bases, _ = first
    found = search_ranks(model, bases, TOKENS, 0.8, levels=3, together=0.25)
    left = {i: np.full((2, 2), 6) for i in range(2)}
    while sum(x.sum() for x in left.values()) > 0.8 * 48:
        now, moved = whole_hidden(folded(bases, left)), {}
        for i, role, head in np.ndindex(2, 2, 2):
            if left[i][role, head] > 2:
                one = {j: x.copy() for j, x in left.items()}
                one[i][role, head] -= 2
                moved[i, role, head] = np.linalg.norm(whole_hidden(folded(bases, one)) - now)
        steps = int(np.ceil((sum(x.sum() for x in left.values()) - 0.8 * 48) / 2))
        for i, role, head in sorted(moved, key=moved.get)[: min(2, steps)]:
            left[i][role, head] -= 2
    for i, ranks in left.items():
        np.testing.assert_array_equal(found[i], ranks)
    with pytest.raises(ValueError, match=r"share is 0\.1: with 3 levels it must be from 0.333333 to 1"):
        search_ranks(model, bases, TOKENS, 0.1, levels=3)


def test_a_cache_keeps_of_each_head_its_own_directions():
    """Ranks of 3 and 2 take as many numbers as 3 and 3; tests/kv/channels/test_low_rank.py cuts streams anyhow."""
    draw = np.random.default_rng(5)
    keys, values = (np.linalg.qr(draw.standard_normal((2, 6, 6)))[0] for _ in "kv")
    own = Projections(keys, values, np.array([[3, 2], [6, 4]]))
    factors, shares = own.factors("whose", (0, 0))
    assert shares == (0.5, 10 / 12)
    cache = sj.kv.Cascade(sj.kv.Window(3), sj.kv.LowRank(32, *shares, factors=factors))
    stream = Stream.drawn(2, 29)
    _, (_, tier) = run(cache, stream, [(3, 7), (7, 1)], width=7, frequencies=FREQUENCIES)
    for slots, x, whole, ranks in ((tier.k, stream.k, keys, (3, 2)), (tier.v, stream.v, values, (6, 4))):
        assert slots.codes.shape[3] == {3: 3, 6: 5}[ranks[0]]
        held = np.asarray(slots.dense())
        for row, head, t in np.ndindex(2, 2, 26):
            some = whole[head][:, : ranks[head]]
            np.testing.assert_allclose(held[row, head, t], some @ some.T @ x[row, t, head], atol=1e-5)
    assert own.factors("whose", (0.5, 0.5))[1] == (0.5, 0.5)


def test_a_file_makes_a_cache_for_its_model_alone(model, trained, tmp_path):
    file, broken = tmp_path / "projections.safetensors", tmp_path / "broken.safetensors"
    as_file(model, trained[-1].bases, drawn_ranks(), [None, None], 48).save(file)
    loaded = HeadProjections.load(file)
    assert loaded.tokens == 48
    np.testing.assert_array_equal(loaded.layers[1].ranks, drawn_ranks()[1])
    caches = sj.kv.preset("matryoshka_kv", projections=str(file), keys=0.5, values=0.5, window=3, capacity=40)
    state = sj.init_state(model, caches)
    assert sj.kv.describe(caches, model).total == sum(x.nbytes for x in jax.tree.leaves(state))
    assert caches[0].renumbered() == caches[1].renumbered()  # ranks that are alike: one program
    whole = sj.kv.preset("matryoshka_kv", projections=str(file), keys=1.0, values=1.0, window=3, capacity=40)
    dense = sj.init_state(model, sj.kv.preset("dense", capacity=40))
    expected = sj.score(model, dense, TOKENS[:1], 12)[1]
    np.testing.assert_allclose(sj.score(model, sj.init_state(model, whole), TOKENS[:1], 12)[1], expected, atol=1e-3)
    broken.write_bytes(b"no tensors")
    for act, message in (
        (lambda: sj.init_state(build(GQA, seed=1), caches), "measured with model [0-9a-f]{16}, and this one is"),
        (lambda: sj.kv.preset("matryoshka_kv"), "matryoshka_kv needs trained directions: give projections=FILE"),
        (lambda: sj.kv.preset("matryoshka_kv", projections=str(broken)), "broken.safetensors: no projections of heads"),
        (lambda: ProjectionConfig(distilled=1.5), "distilled is 1.5: it must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


def test_layers_with_windows_keep_them():
    model = build(LOCAL)
    bases, bounds = principal_bases(model, TOKENS)
    assert (list(bases), bounds) == ([1], [("window", 5), None])
    file = as_file(model, bases, {1: np.full((2, 2), 3)}, bounds, 1)
    assert file.layers[0] == ("window", 5)
