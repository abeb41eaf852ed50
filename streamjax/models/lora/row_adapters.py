"""Adapters that differ by the rows of a batch, in one program (S-LoRA, 2311.03285).

Each row has factors of its own, zeros where it has no adapter. They are data, so rows change theirs without compiling
anything. Ranks are filled up with zeros to one rank a projection, and scales are multiplied in.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int32

from streamjax.models.decoder import Decoder, FlatModel
from streamjax.models.layer_stacking import unstack_layers
from streamjax.models.lora.adapters import Adapter
from streamjax.models.lora.attaching import adapter_of, copy_of, places, ranks_of

Place = tuple[int, str]  # a layer, and a projection of it
Factors = Mapping[Place, tuple[np.ndarray, np.ndarray]]


class RowAdapter(Adapter):
    """Factors of each row: a [B, *in, rank] and b [B, rank, *out], scaled already."""

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T ..."]:
        down = rearrange(self.a[...], "b ... r -> b (...) r").astype(x.dtype)
        low = jnp.einsum("btf,bfr->btr", x, down)
        return jnp.einsum("btr,br...->bt...", low, self.b[...].astype(x.dtype))


def factors_of(model: Decoder) -> Factors:
    """A model's adapters in the host's memory, with their scales multiplied in."""
    found = {}
    for layer, block in enumerate(model.config.blocks):
        for target in places(block):
            adapter = adapter_of(model, layer, target)
            if adapter is not None:
                found[layer, target] = (
                    np.asarray(adapter.a[...]),
                    np.asarray(adapter.b[...]) * np.float32(adapter.scale),
                )
    return found


def require_only_adapters(base: Decoder, adapted: Decoder, name: str) -> None:
    """Raise a ValueError unless a model is a base with adapters beside its weights, and nothing merged into them."""
    changed = {id(leaf) for leaf in jax.tree.leaves(base)} - {id(leaf) for leaf in jax.tree.leaves(adapted)}
    if changed or not ranks_of(adapted):
        raise ValueError(
            f"adapter {name!r} changes weights of the model themselves (DoRA, whole modules, biases): rows cannot "
            "differ in those; merge it, and serve that model by itself"
        )


class RowAdapters:
    """A model whose B rows have adapters, by name.

    Args:
      model: without adapters.
      known: factors of each adapter that there is, see `factors_of`.
      rows: B.

    Attributes:
      model: the same with its rows' adapters; the model itself where none is known. known: as given.
    """

    def __init__(self, model: Decoder, known: Mapping[str, Factors], rows: int):
        self.model, self.known = model, known
        self._names: list[str | None] = [None] * rows
        self._flat: FlatModel | None = None
        shapes: dict[Place, tuple[tuple[int, ...], tuple[int, ...], np.dtype]] = {}
        for factors in known.values():
            for place, (a, b) in factors.items():
                rank = max(a.shape[-1], shapes[place][1][0] if place in shapes else 0)
                shapes[place] = (*a.shape[:-1], rank), (rank, *b.shape[1:]), a.dtype
        self._nothing = {place: (np.zeros(a, dtype), np.zeros(b, dtype)) for place, (a, b, dtype) in shapes.items()}
        if known:
            self.model = copy_of(unstack_layers(model) if model.stack else model)
        self._modules = {}
        for (layer, target), (a, b) in self._nothing.items():
            block = self.model.layers[layer]
            projection = places(block.config)[target]
            module = projection.module_of(block)
            axes = getattr(module, projection.kernel).get_metadata("axes")
            wide_a, wide_b = (jnp.zeros((rows, *x.shape), x.dtype) for x in (a, b))
            names = axes[: projection.inputs], axes[projection.inputs :]
            adapter = RowAdapter(wide_a, wide_b, b.shape[0], names)
            setattr(module, f"{target}_lora", adapter)
            self._modules[layer, target] = adapter

    def set(self, row: int, name: str | None) -> None:
        """From now on a row has the adapter of this name, or none: it is fetched from the host's memory."""
        if self._names[row] == name:
            return
        given = {} if name is None else self.known[name]
        new = {place: _filled_up(given.get(place), none) for place, none in self._nothing.items()}
        old = {place: (adapter.a[...], adapter.b[...]) for place, adapter in self._modules.items()}
        for place, both in _put(old, np.int32(row), new).items():
            for which, value in zip("ab", both, strict=True):
                factor = getattr(self._modules[place], which)
                setattr(self._modules[place], which, factor.replace(value))
        self._names[row], self._flat = name, None

    @property
    def flat(self) -> FlatModel:
        """The model as it is now, for programs that are called once a token."""
        if self._flat is None:
            self._flat = FlatModel(self.model)
        return self._flat


def _filled_up(
    given: tuple[np.ndarray, np.ndarray] | None, none: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Factors with zeros up to the rank of `none`, which are zeros alone."""
    if given is None:
        return none
    a, b = (np.array(x) for x in none)
    rank = given[0].shape[-1]
    a[..., :rank], b[:rank] = given
    return a, b


@partial(jax.jit, donate_argnums=0)
def _put(rows: dict, row: Int32[Array, ""], one: dict) -> dict:
    """The factors of all rows with those of one of them anew."""
    return jax.tree.map(lambda x, new: x.at[row].set(new), rows, one)
