"""Which parameters are trained: splitting a tree of parameters in two, and putting it together again."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, TypeVar

import jax
from flax import nnx

Tree = TypeVar("Tree")
Trainable = type[nnx.Variable] | tuple[type[nnx.Variable], ...]  # parameters of these types are trained, no others


def is_parameter(node: Any) -> bool:
    """Whether a node of a tree is a parameter with its metadata."""
    return isinstance(node, nnx.Variable)


def partition(tree: Tree, trainable: Trainable = nnx.Param, only: Container[str] | None = None) -> tuple[Tree, Tree]:
    """`tree` with None in the place of every parameter that is not trained, and with None in that of those that are.

    `only` names the attributes of `tree` whose parameters count as trained; all where None.
    """

    def chosen(path: tuple[Any, ...], node: Any) -> bool:
        return isinstance(node, trainable) and (only is None or path[0].name in only)

    def keep(wanted: bool) -> Callable[[tuple[Any, ...], Any], Any]:
        return lambda path, node: node if chosen(path, node) is wanted else None

    with_path = jax.tree_util.tree_map_with_path
    return with_path(keep(True), tree, is_leaf=is_parameter), with_path(keep(False), tree, is_leaf=is_parameter)


def combine(first: Tree, second: Tree) -> Tree:
    """The tree of which `partition` made these two."""
    empty = lambda node: node is None or is_parameter(node)  # noqa: E731
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=empty)
