"""Where adapters lie in a Hugging Face model: which module holds which target, and how its factors are laid out there.

A module's adapter has two matrices, A [rank, in] and B [out, rank]. A family's tensor table says in which order their
rows and columns are, because it says so of the module's weights. Some architectures have one module for several targets
(GPT-NeoX, Falcon, MPT and Phi-3 for queries, keys and values, Phi-3 for gate and up): each is then a part of its
outputs.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from einops import rearrange

from streamjax.models.block import Block
from streamjax.models.config import BlockConfig
from streamjax.models.decoder import Decoder
from streamjax.models.families import FAMILIES, Source, Table
from streamjax.models.lora.attaching import Shape, places


@dataclasses.dataclass(frozen=True)
class Part:
    """A target as a part of a module.

    Attributes:
      target: its name.
      source: the entry of the tensor table that holds its weights.
      kernel: shape of one layer's parameter with these weights.
      members: the target's, on the kernel's last axis but one; None: the kernel is the target's.
    """

    target: str
    source: Source
    kernel: Shape
    members: tuple[int, int] | None

    @property
    def width(self) -> int:
        """Input channels of the module."""
        return self.source.shape(self.kernel)[1]

    @property
    def rows(self) -> tuple[int, int]:
        """The module's outputs that the source is about, a half-open range."""
        return self.source.rows or (0, self.source.shape(self.kernel)[0])

    def write_a(self, a: np.ndarray) -> np.ndarray:
        """[rank, in] of an adapter's A."""
        letters = self._letters()
        return rearrange(a, f"{letters.inputs} r -> r {letters.columns}")

    def write_b(self, b: np.ndarray, rows: int) -> np.ndarray:
        """[rows, rank] of an adapter's B, zero in outputs of the module that are not the target's."""
        letters = self._letters()
        held = np.zeros((b.shape[0], *self._sizes(letters.outputs).values()), b.dtype)
        held[self._own()] = b
        whole = np.zeros((rows, b.shape[0]), b.dtype)
        outputs = rearrange(held, f"r {letters.outputs} -> {letters.rows} r")
        whole[slice(*self.rows)] = self.source.paired(outputs, self._head_dim)
        return whole

    def read_a(self, a: np.ndarray) -> np.ndarray:
        """An adapter's A, from [rank, in]."""
        letters = self._letters()
        return rearrange(a, f"r {letters.columns} -> {letters.inputs} r", **self._sizes(letters.inputs))

    def read_b(self, b: np.ndarray) -> np.ndarray:
        """An adapter's B, from [out, rank]."""
        letters = self._letters()
        pattern = f"{letters.rows} r -> r {letters.outputs}"
        outputs = self.source.halved(b[slice(*self.rows)], self._head_dim)
        return rearrange(outputs, pattern, **self._sizes(letters.outputs))[self._own()]

    @property
    def _head_dim(self) -> int:
        return self.source.sizes(self.kernel).get("d", 1)

    def _letters(self) -> _Letters:
        left, right = self.source.pattern.split("->")
        rows, columns = re.findall(r"\([^)]*\)|\w+", left)
        return _Letters(
            rows, columns, *(" ".join(x for x in right.split() if x in group) for group in (rows, columns))
        )  # fmt: skip

    def _sizes(self, letters: str) -> dict[str, int]:
        sizes = self.source.sizes(self.kernel)
        return {letter: sizes[letter] for letter in letters.split()}

    def _own(self) -> tuple:
        """The target's members among those that the source holds."""
        if self.members is None:
            return (...,)
        first = self.source.part[0] if self.source.part else 0
        return ..., slice(self.members[0] - first, self.members[1] - first), slice(None)


@dataclasses.dataclass(frozen=True)
class _Letters:
    """einops groups of a module's outputs and inputs, and the letters of these as the parameter has them."""

    rows: str
    columns: str
    outputs: str
    inputs: str


def modules(model: Decoder) -> dict[str, dict[int, list[Part]]]:
    """The modules that adapters can be on, by name with `{layer}` in it, the layers that have them, and the targets
    that each holds there, in order."""
    config, kinds = model.config, dict[BlockConfig, dict[str, list[Part]]]()
    for layer, kind in enumerate(config.blocks):
        if kind not in kinds:
            kinds[kind] = _modules_of(model.layer_and_row(layer)[0], FAMILIES[config.family].tensors(kind))
    found: dict[str, dict[int, list[Part]]] = {}
    for layer, kind in enumerate(config.blocks):
        for name, parts in kinds[kind].items():
            found.setdefault(name, {})[layer] = parts
    return found


def _modules_of(block: Block, table: Table) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for target, place in places(block.config).items():
        kernel = getattr(place.module_of(block), place.kernel)
        shape = kernel.shape[-len(kernel.get_metadata("axes")) :]
        for source in table[f"layers.{place.path}"]:
            held, own = source.part, place.members
            if held is None or (own is not None and held[0] <= own[0] and own[1] <= held[1]):
                name = source.name.removesuffix(".weight")
                found.setdefault(name, []).append(Part(target, source, shape, own))
    return found


def rows_of(parts: list[Part]) -> int:
    """Output channels of a module."""
    return max(part.rows[1] for part in parts)
