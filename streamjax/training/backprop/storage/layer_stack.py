"""A decoder's layers as rows that loops can walk: stacked ones by a compiled loop, single ones by a Python loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from streamjax.models.block import Block
from streamjax.models.config import BlockConfig
from streamjax.models.decoder import Decoder
from streamjax.training.backprop.gradient_reduction import Reduction
from streamjax.training.backprop.sequence_chunks import zeros_like
from streamjax.training.backprop.storage.landmark_memory import source_of
from streamjax.training.backprop.trainable_parameters import Trainable, partition

Carry = TypeVar("Carry")


class LayerStack:
    """R rows of P layers. Of stacked layers a row is a period of the model; of single layers, one layer.

    A row's index is a traced integer for stacked layers and a Python integer for single ones.
    """

    def __init__(
        self,
        blocks: list[Block],
        first: int,
        stacked: bool,
        model: Decoder,
        trainable: Trainable,
        split: list[Block] | None,
        reduction: Reduction,
    ):
        self.reduction = reduction
        self.stacked = stacked
        self.first = first  # index of the first layer
        self.config = model.config
        self.period = len(blocks) if stacked else 1
        self.count = jax.tree.leaves(blocks[0])[0].shape[0] if stacked else len(blocks)
        parts = [partition(block, trainable) for block in blocks]
        self.params, self.rest = [part[0] for part in parts], [part[1] for part in parts]
        # Dimensions along which a mesh splits the parameters: needed only where it does.
        halves = parts if split is None else [partition(block, trainable) for block in split]
        self.split_params, self.split_rest = [half[0] for half in halves], [half[1] for half in halves]

    def layer(self, row: Any, position: int) -> tuple[Block, Block]:
        """Parameters of one layer that are trained, and its others, whole on each device."""
        if not self.stacked:
            return self._whole(self.params[row], self.rest[row], row)

        def select(leaf: jax.Array) -> jax.Array:
            return row_major(jax.lax.dynamic_index_in_dim(leaf, row, 0, keepdims=False))

        return self._whole(
            jax.tree.map(select, self.params[position]), jax.tree.map(select, self.rest[position]), position
        )

    def _whole(self, params: Block, rest: Block, index: int) -> tuple[Block, Block]:
        gather = self.reduction.gather
        return gather(params, self.split_params[index]), gather(rest, self.split_rest[index])

    def block_config(self, row: Any, position: int) -> BlockConfig:
        """What distinguishes the layer; of stacked ones it is the same in every row."""
        return self.config.blocks[self.first + (position if self.stacked else row)]

    def source(self, row: Any) -> int | None:
        """The layer whose chunk memory the layer reads or makes. Models with memories have no stacked layers."""
        return None if self.config.hsa is None else source_of(self.config, self.first + row)

    def loop(self, start: Any, stop: Any, body: Callable[[Any, Carry], Carry], carry: Carry) -> Carry:
        """`carry = body(row, carry)` for the rows from `start` up to, not including, `stop`."""
        if self.stacked and not (isinstance(start, int) and isinstance(stop, int) and stop - start <= 1):
            return jax.lax.fori_loop(start, stop, body, carry)
        for row in range(start, stop):
            carry = body(row, carry)
        return carry

    def scan(self, count: int, body: Callable[[Any, Carry], tuple[Carry, Any]], carry: Carry) -> tuple[Carry, Any]:
        """`carry, y = body(i, carry)` for i below `count`; the ys stacked, or in a list for single layers."""
        if self.stacked:
            return jax.lax.scan(lambda carry, i: body(i, carry), carry, jnp.arange(count))
        ys = []
        for i in range(count):
            carry, y = body(i, carry)
            ys.append(y)
        return carry, ys

    def loop_back(self, start: Any, stop: Any, body: Callable[[Any, Carry], Carry], carry: Carry) -> Carry:
        """The same from the last row to the first."""
        return self.loop(0, stop - start, lambda i, carry: body(stop - 1 - i, carry), carry)

    def zero_grads(self) -> list[Block]:
        """A place for the gradient of every trained parameter, split as the parameters are."""
        return jax.tree.map(jnp.zeros_like, self.params)

    def zero_sums(self, dtype: Any) -> list[Block]:
        """A place for this device's sums of the gradients of whole parameters."""
        whole = jax.eval_shape(lambda: self.reduction.gather(self.params, self.split_params))
        return zeros_like(whole, dtype)

    def finish(self, sums: list[Block]) -> list[Block]:
        """Sums over all devices, in the dtypes of the parameters and split as they are."""
        total = self.reduction.reduce(sums, self.split_params)
        return jax.tree.map(lambda param, grad: grad.astype(param.dtype), self.params, total)

    def finish_layer(self, sums: Block, row: Any, position: int) -> Block:
        """The same of one layer, but for the dtypes."""
        return self.reduction.reduce(sums, self.split_params[position if self.stacked else row])

    def put(self, grads: list[Block], row: Any, position: int, new: Block) -> list[Block]:
        """`grads` with those of one layer in their place."""
        grads = list(grads)
        if not self.stacked:
            grads[row] = jax.tree.map(lambda old, x: x.astype(old.dtype), grads[row], new)
            return grads

        def place(old: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(old, row_major(x.astype(old.dtype)), row, 0)

        grads[position] = jax.tree.map(place, grads[position], new)
        return grads

    def take(self, grads: list[Block], row: Any, position: int) -> Block:
        """One layer's part of `grads`."""
        if not self.stacked:
            return grads[row]
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row, 0, keepdims=False), grads[position])


def row_major(x: jax.Array) -> jax.Array:
    """`x`, laid out with its last axis dense, as arrays are in a checkpoint.

    Without this the TPU compiler would give a whole stack the layout that a product inside the loop likes best, by a
    copy of all layers' weights in front of the loop. The partitioner would gather `x` for it, so not where `x` may be
    split by axes that are the compiler's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(size > 1 and axis not in mesh.manual_axes for axis, size in mesh.shape.items()):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def layer_stacks(model: Decoder, trainable: Trainable, split: Decoder | None, reduction: Reduction) -> list[LayerStack]:
    """All layers of a model, in order: its stack, if it has one, and the single layers behind it.

    `split` and `reduction`: from `over_rows`.
    """
    found = []
    for stacked, first, blocks in ((True, 0, model.stack), (False, model.stacked_layers, model.layers)):
        if len(blocks):
            dims = None if split is None else list(split.stack if stacked else split.layers)
            found.append(LayerStack(list(blocks), first, stacked, model, trainable, dims, reduction))
    return found
