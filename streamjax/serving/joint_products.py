"""Two computations over the same weights, whose products with a weight are one product.

A chunk of a prompt and the next tokens of other streams go through the same layers. Apart, each weight is read twice,
and products of few rows are slow. Here both are traced, and evaluated side by side: wherever both come to a product of
activations and the same weight, the rows of both are one matrix (SARATHI, 2308.16369). What is not such a product, such
as attention to the streams' own caches, stays apart, so this serves every kind of layer and cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array

W = TypeVar("W")
A = TypeVar("A")
B = TypeVar("B")

# Calls whose bodies are computed as if they stood in their caller.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array, and what it was computed from, if that is weights and constants alone."""

    array: Any
    origin: Hashable = None


@dataclasses.dataclass(frozen=True)
class _Product:
    """Activations times a weight, which one of both computations waits for; the activations' summed axes come last."""

    x: Array
    weight: _Value
    axes: tuple[int, ...]  # of the weight, that are summed over
    options: tuple[tuple[str, Any], ...]

    def like(self, other: _Product) -> bool:
        """Whether both can be one product."""
        same = self.weight.origin, self.axes, self.options, self.x.dtype
        return same == (other.weight.origin, other.axes, other.options, other.x.dtype)

    @property
    def rows(self) -> int:
        return math.prod(self.x.shape[: self.x.ndim - len(self.axes)])

    def result(self, rows: Array) -> Array:
        """The product, from its rows in order."""
        return rows.reshape(*self.x.shape[: self.x.ndim - len(self.axes)], *rows.shape[1:])


_Running = Generator[_Product, Array, list[_Value]]


def jointly(weights: W, first: Callable[[W], A], second: Callable[[W], B]) -> tuple[A, B]:
    """`first(weights)` and `second(weights)`, by one product where both multiply activations by the same weight.

    Equal to both apart but for the last bits, which depend on how many rows a product has. For use under `jax.jit`.
    Products over weights that stand inside of loops, or in kernels, stay apart.

    Args:
      weights: a pytree of arrays, such as a layer.
      first, second: functions of it, which may close over other arrays. Without a reverse mode.

    Example:
      >>> w, x, y = jnp.ones((4, 8)), jnp.ones((16, 4)), jnp.ones((1, 4))
      >>> [out.shape for out in jointly(w, lambda w: x @ w, lambda w: y @ w)]  # one product of 17 rows
      [(16, 8), (1, 8)]
    """
    arrays, structure = jax.tree.flatten(weights)
    known: dict[Hashable, list[Any]] = {}
    given = [_Value(array, ("weight", i)) for i, array in enumerate(arrays)]
    traced, trees = [], []
    for function in (first, second):
        jaxpr, shapes = jax.make_jaxpr(
            lambda *arrays, function=function: function(jax.tree.unflatten(structure, arrays)), return_shape=True
        )(*arrays)
        traced.append(_run(jaxpr, given, known))
        trees.append(jax.tree.structure(shapes))
    found = _in_step(*traced)
    a, b = (
        jax.tree.unflatten(tree, [value.array for value in values]) for tree, values in zip(trees, found, strict=True)
    )
    return a, b


def _in_step(first: _Running, second: _Running) -> tuple[list[_Value], list[_Value]]:
    """What both give in the end; each waits at its next product for the other one."""
    results: list[list[_Value]] = [[], []]
    waiting: list[_Product | None] = [None, None]

    def go_on(which: int, found: Array | None) -> None:
        try:
            run = (first, second)[which]
            waiting[which] = next(run) if found is None else run.send(found)
        except StopIteration as end:
            waiting[which], results[which] = None, end.value

    go_on(0, None)
    go_on(1, None)
    while any(one is not None for one in waiting):
        one, other = waiting
        if one is not None and other is not None and one.like(other):
            rows = _product(one, other)
            go_on(0, one.result(rows[: one.rows]))
            go_on(1, other.result(rows[one.rows :]))
            continue
        for which, alone in enumerate(waiting):
            if alone is not None:
                go_on(which, alone.result(_product(alone)))
    return results[0], results[1]


def _product(*products: _Product) -> Array:
    """One product of the rows of all, [rows, *the weight's other axes]."""
    one = products[0]
    rows = [x.x.reshape(x.rows, *x.x.shape[x.x.ndim - len(x.axes) :]) for x in products]
    x = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
    summed = (tuple(range(1, x.ndim)), one.axes), ((), ())
    found: Array = jax.lax.dot_general_p.bind(x, one.weight.array, dimension_numbers=summed, **dict(one.options))
    return found


def _run(closed: ClosedJaxpr, given: Sequence[_Value], known: dict[Hashable, list[Any]]) -> _Running:
    """Evaluate a program; its products with weights are yielded, and their results taken.

    known: what was computed of weights and constants alone, by how; both programs share it.
    """
    jaxpr = closed.jaxpr
    values: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(_Value, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, given, strict=True))

    def read(variable: Any) -> _Value:
        if isinstance(variable, Literal):
            return _Value(variable.val, ("literal", repr(variable.val), str(variable.aval)))
        return values[variable]

    for equation in jaxpr.eqns:
        operands, name = [read(variable) for variable in equation.invars], equation.primitive.name
        if name in _CALLS:
            found = yield from _run(equation.params[_CALLS[name]], operands, known)
        elif (asked := _asked(name, operands, equation.params)) is not None:
            product, back = asked
            result = yield product
            found = [_Value(jnp.transpose(result, back))]
        else:
            found = _computed(equation, operands, known)
        values.update(zip(equation.outvars, found, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _asked(name: str, operands: Sequence[_Value], params: dict[str, Any]) -> tuple[_Product, list[int]] | None:
    """The product of activations and a weight that an operation is, and how its axes come back in order, if it is."""
    if name != "dot_general" or [one.origin is None for one in operands].count(True) != 1:
        return None
    summed, batch = params["dimension_numbers"]
    which = 0 if operands[0].origin is None else 1  # the activations
    if batch[0]:
        return None
    x, axes = operands[which].array, summed[which]
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    options = tuple((key, value) for key, value in params.items() if key != "dimension_numbers")
    product = _Product(jnp.transpose(x, (*rest, *axes)), operands[1 - which], tuple(summed[1 - which]), options)
    own, others = len(rest), operands[1 - which].array.ndim - len(axes)
    order = list(range(own + others))
    return product, order if which == 0 else order[own:] + order[:own]


def _computed(equation: Any, operands: Sequence[_Value], known: dict[Hashable, list[Any]]) -> list[_Value]:
    """The results of an operation; what weights and constants alone give is computed once."""
    how: Hashable = None
    if all(one.origin is not None for one in operands) and not any(map(_is_program, equation.params.values())):
        params = tuple(sorted((key, repr(value)) for key, value in equation.params.items()))
        how = equation.primitive.name, params, tuple(one.origin for one in operands)
    if how is None or how not in known:
        with equation.ctx.manager:
            options = equation.primitive.get_bind_params(equation.params)
            found = equation.primitive.bind(*(one.array for one in operands), **options)
        found = list(found) if equation.primitive.multiple_results else [found]
        if how is None:
            return [_Value(array) for array in found]
        known[how] = found
    return [_Value(array, (how, i)) for i, array in enumerate(known[how])]


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr") or callable(value)
