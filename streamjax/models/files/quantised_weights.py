"""Weights that a Hugging Face checkpoint holds in blocks of MXFP4 or FP8, dequantised as they are read.

A tensor of blocks and the tensor of its scales are one tensor here, named and shaped as in a checkpoint without blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from streamjax.models.families.config_fields import Quantisation
from streamjax.models.files.safetensors_files import DTYPES, AnyTensor, Float32Rows, StoredTensor, read_bytes

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Of each byte, the low half first, times 2: with the largest exponent, a factor of its own would be infinite.
_PAIRS = 2 * np.stack((np.tile(_E2M1, 16), np.repeat(_E2M1, 16)), axis=1)
_FACTORS = np.ldexp(np.float32(1), np.arange(256) - 127 - 1)  # of each exponent, which is biased by 127
_FP8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_SCALES = {**DTYPES, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
_BLOCKS, _BLOCK_SCALES, _SCALE = "_blocks", "_scales", "_scale_inv"
_OF_ACTIVATIONS = ".activation_scale"


def dequantised(tensors: Mapping[str, StoredTensor], quantisation: Quantisation | None) -> dict[str, AnyTensor]:
    """The tensors of a checkpoint, with one in the place of blocks and their scales.

    Args:
      tensors: as they are stored, by name.
      quantisation: what config.json says of them; None: as they are.

    Raises:
      ValueError: scales that do not fit their blocks; one line that names the file and the tensor.
    """
    found: dict[str, AnyTensor] = dict(tensors)
    if quantisation is None:
        return found
    for name, stored in tensors.items():
        if quantisation.method == "mxfp4" and name.endswith(_BLOCKS):
            whole, scales = name.removesuffix(_BLOCKS), tensors.get(name.removesuffix(_BLOCKS) + _BLOCK_SCALES)
            if scales is not None:
                found[whole] = _mxfp4(whole, stored, scales)
                del found[name], found[scales.name]
        elif quantisation.method == "fp8" and stored.code in _FP8:
            scales = tensors.get(name + _SCALE)
            if scales is not None:
                found[name] = _fp8(stored, scales, quantisation.block)
                del found[scales.name]
                found.pop(name.rpartition(".")[0] + _OF_ACTIVATIONS, None)  # weights alone are in blocks here
    return found


def _mxfp4(name: str, blocks: StoredTensor, scales: StoredTensor) -> MXFP4Tensor:
    if blocks.code != "U8" or len(blocks.shape) != 4:
        wrong = f"is {blocks.code} of shape {list(blocks.shape)}; MXFP4 blocks are U8 [experts, rows, groups, bytes]"
        raise ValueError(f"{blocks.file}: tensor {blocks.name!r} {wrong}")
    _check_scales(blocks, scales, blocks.shape[:-1], ("U8",))
    experts, rows, groups, width = blocks.shape
    return MXFP4Tensor(blocks.file, name, (experts, 2 * groups * width, rows), blocks, scales)


def _fp8(weight: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None) -> FP8Tensor:
    if block is None:
        expected: tuple[int, ...] = scales.shape if math.prod(scales.shape) == 1 else ()
    elif len(weight.shape) < 2:
        raise ValueError(f"{weight.file}: tensor {weight.name!r} has {len(weight.shape)} axis; FP8 blocks have two")
    else:
        expected = (*weight.shape[:-2], *(-(-n // size) for n, size in zip(weight.shape[-2:], block, strict=True)))
    _check_scales(weight, scales, expected, tuple(_SCALES))
    return FP8Tensor(weight.file, weight.name, weight.shape, weight, scales, block)


def _check_scales(blocks: StoredTensor, scales: StoredTensor, shape: tuple[int, ...], codes: tuple[str, ...]) -> None:
    if scales.shape != shape or scales.code not in codes:
        found, wanted = f"{scales.code} {list(scales.shape)}", f"{' or '.join(codes)} {list(shape)}"
        raise ValueError(f"{scales.file}: tensor {scales.name!r} is {found}; {blocks.name!r} asks for {wanted}")


def raw_rows(stored: StoredTensor, start: int, stop: int, dtype: Any) -> np.ndarray:
    """[start, stop) of a tensor's first axis, as what the bytes are."""
    values = np.empty((stop - start, *stored.shape[1:]), dtype)
    offset = stored.offset + start * math.prod(stored.shape[1:]) * values.itemsize
    read_bytes(stored.file, offset, values.reshape(-1).view(np.uint8), stored.name)
    return values


@dataclasses.dataclass(frozen=True, eq=False)
class MXFP4Tensor(Float32Rows):
    """Matrices of experts in blocks of 32 numbers of four bits (e2m1) with one exponent; see `StoredTensor`.

    Attributes:
      file, name: where it would be in a checkpoint without blocks.
      shape: [E, columns, rows]: such a checkpoint has the matrices transposed.
      stored: blocks, uint8 [E, rows, groups, bytes]; two numbers in a byte, the first in its lower half.
      scales: exponents of two, uint8 [E, rows, groups], biased by 127.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    stored: StoredTensor
    scales: StoredTensor

    @property
    def code(self) -> str:
        return "F32"

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The matrices of experts [start, stop), float32.

        Raises:
          ValueError: the file has become shorter.
        """
        factors = _FACTORS[raw_rows(self.scales, start, stop, np.uint8)]
        values = np.take(_PAIRS, raw_rows(self.stored, start, stop, np.uint8), axis=0).reshape(*factors.shape, -1)
        values *= factors[..., None]
        return np.swapaxes(values.reshape(stop - start, self.shape[2], self.shape[1]), 1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class FP8Tensor(Float32Rows):
    """A weight in numbers of eight bits, with a factor for each block of its last two axes; see `StoredTensor`.

    Attributes:
      file, name, shape: of the weight.
      stored: its numbers.
      scales: what they are multiplied with, one a block; one in all where there are no blocks.
      block: rows and columns of a block.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    stored: StoredTensor
    scales: StoredTensor
    block: tuple[int, int] | None

    @property
    def code(self) -> str:
        return "F32"

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The values [start, stop) along the first axis, float32.

        Raises:
          ValueError: the file has become shorter.
        """
        values = raw_rows(self.stored, start, stop, _FP8[self.stored.code]).astype(np.float32)
        dtype = _SCALES[self.scales.code]
        if self.block is None:
            whole = dataclasses.replace(self.scales, shape=(1,))
            return values * raw_rows(whole, 0, 1, dtype).astype(np.float32)[0]
        rows, columns = self.block
        flat = len(self.shape) == 2  # blocks lie along the first axis too
        first, last = (start // rows, -(-stop // rows)) if flat else (start, stop)
        scales = raw_rows(self.scales, first, last, dtype).astype(np.float32)
        skipped = start - first * rows if flat else 0
        scales = np.repeat(scales, rows, axis=-2)[..., skipped : skipped + values.shape[-2], :]
        return values * np.repeat(scales, columns, axis=-1)[..., : values.shape[-1]]
