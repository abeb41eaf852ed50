"""`CQ`: channels that go together share a code, by codebooks that were fitted to a model (CQ, arXiv 2405.03917)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels.coded import Coded
from pallas_kernels.unpacking.codebooks import CodebookUnpacking, entries_of, entry_words, looked_up, turned_keys
from pallas_kernels.unpacking.protocol import Unpackable
from streamjax.field_checks import Size, check_fields
from streamjax.kv.codecs.codec import Codec, Codes, Role
from streamjax.kv.codecs.integers import Bits

GRID = 511  # of a codebook's unit to either side: sums of products of such numbers are exact in float32
TOGETHER = 256  # tokens of which distances to all entries exist at a time


@dataclasses.dataclass(frozen=True)
class Codebooks:
    """The codebooks of a layer, as bytes that hash once; `coupled` channels are an entry.

    keys, values: float32, for each head and each run of channels its entries, [K D / coupled x entries, coupled]. Keys
    are those before rotation. model: a fingerprint of the model that they were measured with.
    """

    keys: bytes
    values: bytes
    coupled: int
    model: str

    def __repr__(self) -> str:
        return f"Codebooks({self.coupled} channels of model {self.model})"

    def array(self, role: Role) -> Float[np.ndarray, "M c"]:
        """All entries, one a row."""
        return np.frombuffer(self.keys if role == "k" else self.values, np.float32).reshape(-1, self.coupled)


@dataclasses.dataclass(frozen=True)
class CQ(Codec):
    """`coupled` channels side by side are the nearest entry of a codebook of theirs: `bits / coupled` bits a channel.

    Each head and each run of channels has a codebook of 2^bits entries, fitted to a text (`sj.measure_codebooks`); they
    lie in the state, once a stream. A token is coded by itself. Entries and what is compared with them lie on a grid of
    511 steps to either side, so that which of two is nearer is exact; keys are compared as they were before rotation.
    Decoding kernels look codes of 8 bits up as they read them, and rotate the keys by their positions.

    Args:
      coupled: channels that share a code.
      bits: of a code.
      codebooks: of the layer; None says what they would be.
    """

    coupled: Size = 4
    bits: Bits = 8  # type: ignore[assignment]
    codebooks: Codebooks | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.coupled > 8:
            raise ValueError(f"CQ.coupled is {self.coupled}: at most 8 channels share a code")

    @property
    def unrotated(self) -> bool:
        return True

    @property
    def made_for(self) -> str | None:
        return None if self.codebooks is None else self.codebooks.model

    def without_numbers(self) -> CQ:
        return dataclasses.replace(self, codebooks=None)

    def one_by_one(self) -> Codec:
        return self

    def check(self, head_dim: int) -> None:
        if head_dim % self.coupled:
            raise ValueError(f"{self!r} couples {self.coupled} channels, which do not divide heads of {head_dim}")

    def table_shapes(self, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        parts = width // self.coupled
        words = jax.ShapeDtypeStruct((parts, -(-self.coupled // 2) << self.bits), jnp.int32)
        return words, jax.ShapeDtypeStruct((parts, 1), jnp.float32)

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Unpackable:
        unpacking = CodebookUnpacking(codes.shape[3] * self.coupled, 1, self.coupled, self.bits)
        return Unpackable(codes, {"entries": tables[0], "step": tables[1]}, unpacking)

    def turned(self, keys: Coded | Unpackable, position: UInt32[Array, "B #K S"], steps: tuple[int, ...]) -> Unpackable:
        assert isinstance(keys, Unpackable)
        return turned_keys(keys, position, steps)

    def tables(
        self, role: Role, heads: int, width: int
    ) -> tuple[Int32[np.ndarray, "K P _"], Float[np.ndarray, "K P 1"]]:
        """Entries in steps of their part's grid, two channels in 32 bits, and how large a step is."""
        if self.codebooks is None:
            raise ValueError(f"{self!r} has no codebooks: measure them, sj.measure_codebooks(model, ids).save(FILE)")
        given, parts = self.codebooks.array(role), heads * width // self.coupled
        if given.shape != (parts << self.bits, self.coupled):
            has = f"{len(given)} entries of {self.codebooks.coupled} channels"
            raise ValueError(f"the codebooks have {has}, and this layer needs {parts << self.bits} of {self.coupled}")
        entries = given.reshape(parts, -1, self.coupled)
        step = grid_steps(entries)
        words = entry_words(np.clip(np.round(entries / step[:, None, None]), -GRID, GRID).astype(np.int32))
        return np.asarray(words).reshape(heads, parts // heads, -1), step.astype(np.float32).reshape(heads, -1, 1)

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        entries, step = tables
        rows, heads, groups, size, _ = x.shape
        line = rearrange(x.astype(jnp.float32), "b k n g (p c) -> b k (n g) p c", c=self.coupled)
        whole = jnp.clip(jnp.round(line / step[:, :, None]), -GRID, GRID)
        books = entries_of(entries, self.bits, self.coupled).astype(jnp.float32)
        squares = jnp.sum(books * books, axis=-1, keepdims=True)
        number = jnp.arange(2**self.bits, dtype=jnp.int32)[:, None]

        def nearest(some: Float[Array, "B K T P c"]) -> Array:
            """The least of whole numbers that end with whose they are: a CPU has no fast argmin."""
            products = jnp.einsum("bkpec,bktpc->bkpet", books, 2 * some, precision="highest")
            least = jnp.min(((squares - products).astype(jnp.int32) << self.bits) + number, axis=3)
            return jnp.swapaxes(least & (2**self.bits - 1), 2, 3).astype(jnp.uint8)

        tokens = groups * size
        if tokens > TOGETHER:
            blocks = -(-tokens // TOGETHER)
            more = jnp.pad(whole, ((0, 0), (0, 0), (0, blocks * TOGETHER - tokens), (0, 0), (0, 0)))
            cut = rearrange(more, "b k (n t) p c -> n b k t p c", t=TOGETHER)
            codes = rearrange(jax.lax.map(nearest, cut), "n b k t p -> b k (n t) p")[:, :, :tokens]
        else:
            codes = nearest(whole)
        return codes.reshape(rows, heads, groups, size, -1), ()

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        whole, (entries, step) = codes[0], tables
        rows, heads, groups, size, parts = whole.shape
        line = whole.reshape(rows, heads, groups * size, parts)
        found = looked_up(line, entries, self.bits, self.coupled).astype(jnp.float32) * step[:, :, None]
        return found.reshape(rows, heads, groups, size, parts * self.coupled)


def grid_steps(entries: Float[np.ndarray, "P E c"]) -> Float[np.ndarray, " P"]:
    """The least power of two of which each part's entries are at most `GRID`, so that what lies on its grid stays."""
    most = np.maximum(np.abs(entries).max(axis=(1, 2)), math.ldexp(1.0, -100))
    return np.exp2(np.ceil(np.log2(most / GRID)))
