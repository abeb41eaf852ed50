"""One product for the rows of two computations, wherever both multiply by the same weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.serving.joint_products import jointly

_DRAW = np.random.default_rng(0)


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(_DRAW.normal(size=shape), jnp.float32)


WEIGHTS = {"in": drawn(4, 2, 3), "out": drawn(6, 4), "words": drawn(9, 4), "other": drawn(4, 4)}
FEW, MANY = drawn(3, 1, 4), drawn(1, 5, 4)


def layer(weights, x):
    """A fused product, a weight that is first computed of another one, a table that is the product's left side."""
    inner = jnp.einsum("bte,ekd->btkd", x, 2 * weights["in"])
    inner = jax.nn.silu(inner.reshape(*x.shape[:2], 6))
    x = x + jax.jit(lambda w, y: y @ w)(weights["out"], inner)
    return jax.lax.dot_general(weights["words"], x, (((1,), (2,)), ((), ()))), x.sum()


def products(function) -> list[tuple[int, ...]]:
    """The shapes of all products of a program, in order."""
    return [tuple(map(int, sizes.split(","))) for sizes in re.findall(r"f32\[([\d,]+)\] = dot_general", str(function))]


def same(found, wanted) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_rows_of_both_are_one_matrix():
    def both(weights, few, many):
        return jointly(weights, lambda w: layer(w, few), lambda w: layer(w, many))

    same(jax.jit(both)(WEIGHTS, FEW, MANY), (layer(WEIGHTS, FEW), layer(WEIGHTS, MANY)))
    assert products(jax.make_jaxpr(both)(WEIGHTS, FEW, MANY)) == [(8, 2, 3), (8, 4), (8, 9)]


@pytest.mark.parametrize("swapped", [False, True])
def test_what_only_one_has_is_computed_for_it_alone(swapped):
    """Behind a product that is another one on both sides, or that only one has, both are in step again."""

    def longer(weights):
        x = layer(weights, MANY)[0].T[:, 0] @ jnp.ones((9, 4))
        return layer(weights, (x @ weights["other"])[None])

    def shorter(weights):
        return layer(weights, FEW)

    one, other = (shorter, longer) if swapped else (longer, shorter)
    found = jax.jit(lambda weights: jointly(weights, one, other))(WEIGHTS)
    same(found, (one(WEIGHTS), other(WEIGHTS)))
    shapes = products(jax.make_jaxpr(lambda weights: jointly(weights, one, other))(WEIGHTS))
    assert [sizes[0] for sizes in shapes[:3]] == [8, 8, 8]  # rows
    assert len(shapes) == 3 + 1 + 1 + 3  # those of both, two of the longer one's own, and its second layer


def test_products_of_other_types_weights_and_axes_stay_apart():
    def turned(weights):
        return jnp.einsum("bte,fe->btf", MANY, weights["other"])

    def half(weights):
        return FEW.astype(jnp.bfloat16) @ weights["other"].astype(jnp.bfloat16)

    for other, apart in ((half, []), (lambda w: FEW @ w["other"], [(3, 4)]), (lambda w: FEW @ w["words"].T, [(3, 9)])):
        same(jointly(WEIGHTS, turned, other), (turned(WEIGHTS), other(WEIGHTS)))
        jaxpr = jax.make_jaxpr(lambda weights, other=other: jointly(weights, turned, other))(WEIGHTS)
        assert products(jaxpr) == [(5, 4), *apart]
        assert str(jaxpr).count("dot_general[") == 2


def test_what_weights_alone_give_is_computed_once_and_loops_go_on():
    def looped(weights, x):
        scaled = jnp.sin(weights["other"])

        def body(x, _):
            return x @ scaled, x.sum()

        return jax.lax.scan(body, x, None, length=3)

    def both(weights, few, many):
        return jointly(weights, lambda w: looped(w, few), lambda w: looped(w, many))

    same(jax.jit(both)(WEIGHTS, FEW, MANY), (looped(WEIGHTS, FEW), looped(WEIGHTS, MANY)))
    assert str(jax.make_jaxpr(both)(WEIGHTS, FEW, MANY)).count("= sin") == 1
