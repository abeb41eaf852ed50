"""A model as its arrays in a row, which compiled programs take in a fraction of the time that modules take."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from streamjax.models.decoder import Decoder


@jax.tree_util.register_pytree_node_class
class FlatModel:
    """The arrays of a model, for programs that are called once a token.

    Every call of a compiled program walks through the trees of its arguments. Of modules that is work for Python: for
    SmolLM2-135M, whose 30 layers have 182 arrays, about a millisecond a call. Here it is done once.

    Args:
      model: what it is now; changes of its modules do not show here.

    Example:
      >>> flat = FlatModel(model)
      >>> jax.jit(lambda flat, tokens: flat.model.hidden(tokens))(flat, tokens)
    """

    def __init__(self, model: Decoder):
        arrays, self._structure = jax.tree.flatten(model)
        self._arrays = tuple(arrays)

    @property
    def model(self) -> Decoder:
        """The model; inside of a program, of its tracers."""
        whole: Decoder = jax.tree.unflatten(self._structure, self._arrays)
        return whole

    def tree_flatten(self) -> tuple[tuple[Array, ...], Any]:
        return self._arrays, self._structure

    @classmethod
    def tree_unflatten(cls, structure: Any, arrays: tuple[Array, ...]) -> FlatModel:
        flat = object.__new__(cls)
        flat._arrays, flat._structure = arrays, structure
        return flat
