"""What a Hugging Face architecture is to the library: its config, both ways, and where its tensors lie.

A family's tensor table names, for every parameter of a `Decoder`, the checkpoint tensors that hold it, each with one
einops pattern from the checkpoint's axes to the parameter's. Loading reads the pattern from left to right and saving
from right to left, so that there is one description of a layout and no second one to contradict it.

Letters: v vocabulary, e d_model, k key/value heads, g what shares one (G queries, key, value; or gate, up), d head
width, f MLP width, x experts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from streamjax.models.config import BlockConfig, ModelConfig, UniformConfig
from streamjax.models.families.config_fields import Fields


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint tensor, or some of its rows, that holds a parameter or a part of one.

    Attributes:
      name: tensor name; `{layer}` stands for the layer's index, `{expert}` for an expert's: one tensor each. A family
        with `Family.numbers` may have further names in braces.
      pattern: einops pattern, checkpoint axes on the left, parameter axes on the right.
      part: half-open range on the parameter's `g` axis that the tensor holds; None: all of it.
      rows: half-open range on the tensor's first axis that is meant; None: all of it.
      expert: the place on the parameter's `x` axis that the tensor holds; None: all of it.
      pairs: how many of a head's first channels rotate in pairs of neighbours (GPT-J). The parameter has the first
        channels of all pairs before the second ones; queries and keys that are both put so have the same products.
        `d` is then the last letter of the pattern's first axis.
    """

    name: str
    pattern: str
    part: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None
    expert: int | None = None
    pairs: int = 0

    def halved(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Rows of the tensor, whole heads of `width` channels, in the order of the parameter's channels."""
        return self._ordered(rows, self._order(width)) if self.pairs else rows

    def paired(self, rows: np.ndarray, width: int) -> np.ndarray:
        """The inverse of `halved`."""
        return self._ordered(rows, np.argsort(self._order(width))) if self.pairs else rows

    def _order(self, width: int) -> np.ndarray:
        pairs = np.arange(self.pairs)
        return np.concatenate((pairs[::2], pairs[1::2], np.arange(self.pairs, width)))

    @staticmethod
    def _ordered(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, len(order), *rows.shape[1:])[:, order].reshape(rows.shape)

    def load(self, rows: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """What some rows of the tensor hold, by the parameter's axes; `sizes` of the letters, for these rows."""
        return rearrange(self.halved(rows, sizes.get("d", 1)), self.pattern, **sizes)

    def save(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `load`: the tensor's rows, from values by the parameter's axes."""
        letters = self.pattern.split("->")[1].split()
        width = values.shape[letters.index("d")] if "d" in letters else 1
        return self.paired(rearrange(values, self.inverse), width)

    @property
    def inverse(self) -> str:
        """The pattern from the parameter's axes to the checkpoint's."""
        left, right = self.pattern.split("->")
        return f"{right.strip()} -> {left.strip()}"

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Size of each letter, for a parameter of this shape."""
        letters = self.pattern.split("->")[1].split()
        sizes = dict(zip(letters, shape, strict=True))
        if self.part is not None:
            sizes["g"] = self.part[1] - self.part[0]
        if self.expert is not None:
            sizes["x"] = 1
        return sizes

    def of_layer(self, numbers: Mapping[str, int], shape: tuple[int, ...]) -> list[Source]:
        """The tensors of one layer, whose parameter has this shape: one an expert where the name says so."""
        if "{expert}" not in self.name:
            return [dataclasses.replace(self, name=self.name.format(**numbers))]
        experts = self.sizes(shape)["x"]
        names = [self.name.format(**numbers, expert=expert) for expert in range(experts)]
        return [dataclasses.replace(self, name=name, expert=expert) for expert, name in enumerate(names)]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape that the checkpoint tensor (or its rows) must have, for a parameter of this shape."""
        sizes = self.sizes(shape)
        groups = re.findall(r"\(([^)]*)\)|(\w+)", self.pattern.split("->")[0])
        known = {**sizes, "1": 1}
        return tuple(math.prod(known[letter] for letter in (group or single).split()) for group, single in groups)

    def outermost(self, sizes: Mapping[str, int]) -> tuple[str, int]:
        """The letter that runs slowest along the tensor's rows, but for letters of size 1, and its parameter axis."""
        left, right = self.pattern.split("->")
        letters = re.findall(r"^\(([^)]*)\)|^(\w+)", left)[0]
        rows = (letters[0] or letters[1]).split()
        letter = next((letter for letter in rows if sizes[letter] > 1), rows[-1])
        return letter, right.split().index(letter)

    @property
    def one_row(self) -> bool:
        """Whether the tensor's first axis has one place, so that it is read as a whole."""
        return self.pattern.startswith("1 ")

    def index(self) -> tuple[slice, ...]:
        """Where the parameter takes what the tensor holds."""
        letters = self.pattern.split("->")[1].split()
        held = {} if self.part is None else {"g": slice(*self.part)}
        if self.expert is not None:
            held["x"] = slice(self.expert, self.expert + 1)
        return tuple(held.get(letter, slice(None)) for letter in letters)


Table = Mapping[str, tuple[Source, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
      name: `ModelConfig.family`.
      architectures: names in `architectures` of a config.json; the first is written.
      model_types: `model_type` of a config.json; the first is written.
      read: fields of a config.json -> the model, in either form; ValueError for what is not implemented.
      write: ModelConfig -> fields of a config.json. What it cannot say is found by reading it back. A family of models
        with equal layers writes from their flat form: `of_uniform(write)`.
      tensors: a block -> the tensor table. Keys are parameter paths, those of a layer starting with `layers.`; what the
        block does not have may be in it too.
      renames: regular expressions and replacements applied to the names in a checkpoint.
      ignored: regular expressions of tensors (after renaming) that are left alone on purpose.
      packed: other tensors that hold some parameters in some checkpoints; read where they are there, never written.
      numbers: where a block is read from several layers of a file: for each block, what stands for the names in braces.
        None: `{layer}` is the block's index.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read: Callable[[Fields], ModelConfig | UniformConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[BlockConfig], Table]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    packed: Table = dataclasses.field(default_factory=dict)
    numbers: Callable[[ModelConfig], Sequence[Mapping[str, int]]] | None = None

    def layer_numbers(self, config: ModelConfig) -> Sequence[Mapping[str, int]]:
        """For each block, what stands for the names in braces of a tensor's name."""
        if self.numbers is not None:
            return self.numbers(config)
        return [{"layer": layer} for layer in range(config.num_layers)]


def of_uniform(write: Callable[[UniformConfig], dict[str, Any]]) -> Callable[[ModelConfig], dict[str, Any]]:
    """A family's writer, from one that takes the flat form of models with equal layers."""
    return lambda config: write(UniformConfig.from_model_config(config))
