"""What a codec says of its codes where `Coded` has no words for them: `Unpacking`, and slots of such codes.

The decoding kernels fetch codes and what belongs to them block by block, call the codec's own function there, and go on
with keys or values. So a new codec brings one small class and no kernel.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

Lies = Literal["group", "slot", "all"]
Load = Callable[..., Array]  # see `Unpacking.on_gpu`


@dataclasses.dataclass(frozen=True)
class Unpacking(abc.ABC):
    """How slots of codes become keys or values inside of a kernel. Subclasses are static and hashable.

    width: channels of a slot. group: successive slots that have numbers together.
    """

    width: int
    group: int

    @property
    @abc.abstractmethod
    def lies(self) -> Mapping[str, Lies]:
        """Numbers beside the codes by name, [B, K, n, e]: a row for each group of slots, for each slot, or "all" n at
        every block of slots. What all rows of a batch or all heads have together comes with 1 in their place."""

    @property
    def by_slot(self) -> bool:
        """Whether `on_tpu` gives a row for each slot, and not a column."""
        return False

    @property
    def order(self) -> tuple[int, ...] | None:
        """The channels that `on_tpu` gives, in its order, which queries or outputs get; None: as they are."""
        return None

    @property
    def slots_together(self) -> int:
        """How many slots `on_gpu` must be given at once, from a multiple of it on: 1 where it takes any."""
        return 1

    def refused_by(self, platform: Literal["tpu", "triton"]) -> str | None:
        """Why a platform's kernels cannot call it; None where they can."""
        return None

    @abc.abstractmethod
    def plain(self, codes: UInt8[Array, "B K S c"], numbers: Mapping[str, Array]) -> Float[Array, "B K S D"]:
        """All numbers, in memory: what the kernels never make."""

    @abc.abstractmethod
    def on_tpu(
        self, codes: Int[Array, "c slots"], numbers: Mapping[str, Shaped[Array, "_ _"]], dtype: DTypeLike
    ) -> Float[Array, "D slots"] | Float[Array, "slots D"]:
        """A block's keys or values, in float32; numbers of slots have slots behind, as codes do.

        Numbers of groups behind a ring's end are 0; what else lies there is anything, and may not spread to other
        slots. dtype: of queries, as which products may take their operands.
        """

    @abc.abstractmethod
    def on_gpu(self, load: Load, slot: Int[Array, " n"], channel: Int[Array, " d"], dtype: DTypeLike) -> Array:
        """The channels of some slots, [n, d] in float32.

        load: `load(name, row, column)` of the codes, "codes", or of numbers, at places that broadcast to two dimensions
        that do. Whole numbers come as int32, others as float32. Channels from `width` on are nobody's.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unpackable:
    """Slots [B, K, S, D] in codes that `unpacking` unpacks: `c` bytes a slot, and numbers by name."""

    codes: UInt8[Array, "B K S c"]
    numbers: dict[str, Shaped[Array, "_ _ _ _"]]
    unpacking: Unpacking = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.codes.shape[:3], self.unpacking.width

    @property
    def group(self) -> int:
        """Successive slots that have numbers together."""
        return self.unpacking.group

    def in_pages(self, page: int) -> Unpackable:
        """The same: pages have whole groups."""
        return self

    def widened(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "B K S D"]:
        """The numbers, all of them in memory: what the kernels never make."""
        return self.unpacking.plain(self.codes, self.numbers).astype(dtype)


def in_order(x: Float[Array, "... D"], order: tuple[int, ...] | None, back: bool = False) -> Float[Array, "... D"]:
    """Channels as `on_tpu` gives them, or back as they were."""
    if order is None:
        return x
    return x[..., np.argsort(order) if back else np.asarray(order)]


def broadcast_index(index: Any, dims: int) -> Any:
    """A block's place in an array along a dimension that may be shared."""
    return 0 if dims == 1 else index
