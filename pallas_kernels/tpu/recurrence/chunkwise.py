"""Recurrences over matrix states on TPUs, a block of tokens at a time, forwards and backwards.

A step of the grid has a block of tokens of some heads: its products are `recurrence_block`'s, and the heads' states
stay in fast memory from block to block. Backwards the blocks go from the last to the first, each made again behind the
state that was kept in front of it, and the states' cotangents stay in fast memory. Where a group has more heads than a
step takes, the gradients of its queries and keys are summed in place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import recurrence_block as core
from pallas_kernels.recurrence_block import Operands
from pallas_kernels.recurrence_products import Products
from pallas_kernels.tpu.tiles import LANES, SUBLANES

HEADS = 8  # that a step of the grid takes, if a group or some make so many
VMEM_BYTES = 64 * 2**20


def block_size(channels: bool, length: int) -> int:
    """How many tokens a block has."""
    return min(64 if channels else 128, max(16, 1 << (length - 1).bit_length()))


class _Cut(NamedTuple):
    """How a call is cut: sizes, and the groups and the heads of a group that a step has."""

    batch: int
    blocks: int
    size: int
    groups: int
    shared: int
    keys: int
    width: int
    own_groups: int
    own_shared: int
    channels: bool
    delta: bool
    segmented: bool

    @classmethod
    def make(cls, given: Operands, size: int) -> _Cut:
        batch, length, groups, keys = given.q.shape
        shared, width = given.v.shape[3:]
        fits = [n for n in range(min(HEADS, shared), 0, -1) if shared % n == 0]
        own_shared = next((n for n in fits if n * width % LANES == 0), fits[0])
        most = HEADS // own_shared if own_shared == shared else 1
        own_groups = next(n for n in range(min(most, groups), 0, -1) if groups % n == 0)
        known = given.decay.shape[1] == length, given.beta is not None, given.segments is not None
        return cls(batch, length // size, size, groups, shared, keys, width, own_groups, own_shared, *known)

    @property
    def heads(self) -> int:
        return self.own_groups * self.own_shared

    @property
    def betas(self) -> int:
        """The row of small numbers with which those of what heads write begin."""
        return 0 if self.channels else 2 * self.heads

    @property
    def shares(self) -> int:
        """How many steps have heads of one group."""
        return self.shared // self.own_shared

    @property
    def grid(self) -> tuple[int, ...]:
        return self.batch, self.groups // self.own_groups, self.blocks, self.shares

    def columns(self) -> int:
        """Rows of small numbers that a step has: decays, fine and coarse, then what heads write, then segments."""
        used = 2 * self.heads * (not self.channels) + self.heads * self.delta + self.segmented
        return max(1, -(-used // SUBLANES)) * SUBLANES

    def specs(self, backwards: bool) -> dict[str, Any]:
        """Of each operand and result. Initial and final states move in and out at the first and the last block."""
        shares, last = self.shares, self.blocks - 1

        def spec(shape: tuple[int | None, ...], index: Any) -> Any:
            def at(b: Any, g: Any, n: Any, r: Any) -> Any:
                return index(b, g, (last - n) if backwards else n, r)

            return pl.BlockSpec((None, *shape), at)

        def border(block: int) -> Any:
            """States that are there at one block alone: elsewhere the index stays, so that nothing is moved."""

            def at(b: Any, g: Any, n: Any, r: Any) -> Any:
                other = (shares - 1) if block == first else 0
                return b, g * shares + jnp.where(n == block, r, other), 0, 0, 0

            first = last if backwards else 0
            return spec((None, self.heads, self.width, self.keys), at)

        return {
            "pair": spec((self.size, self.own_groups * self.keys), lambda b, g, n, r: (b, n, g)),
            "heads": spec((self.size, self.heads * self.width), lambda b, g, n, r: (b, n, g * shares + r)),
            "steps": spec((self.size, self.heads * self.keys), lambda b, g, n, r: (b, n, g * shares + r)),
            "small": spec((None, None, self.columns(), self.size), lambda b, g, n, r: (b, n, g * shares + r, 0, 0)),
            "kept": spec(
                (None, None, self.heads, self.width, self.keys), lambda b, g, n, r: (b, n, g * shares + r, 0, 0, 0)
            ),
            "first": border(0),
            "last": border(last),
        }

    def flat(self, given: Operands) -> dict[str, Array]:
        """The operands as specs cut them: heads beside each other in the lanes, small numbers as rows."""
        parts = self.groups * self.shares // self.own_groups

        def rows(x: Array) -> Array:
            return rearrange(x, "b n (p a) (s r) c -> b n (p s) (a r) c", a=self.own_groups, r=self.own_shared)

        small = [] if given.coarse is None else [rows(given.decay), rows(given.coarse)]
        small += [] if given.beta is None else [rows(given.beta)]
        if given.segments is not None:
            segments = given.segments.astype(jnp.float32)[:, :, None, None]
            small.append(jnp.broadcast_to(segments, (*segments.shape[:2], parts, 1, self.size)))
        found = {
            "q": rearrange(given.q, "b t g k -> b t (g k)"),
            "k": rearrange(given.k, "b t g k -> b t (g k)"),
            "v": rearrange(given.v, "b t g r v -> b t (g r v)"),
        }
        if small:
            joined = jnp.concatenate(small, axis=3)
            found["small"] = jnp.pad(joined, ((0, 0),) * 3 + ((0, self.columns() - joined.shape[3]), (0, 0)))
        if self.channels:
            found["steps"] = rearrange(given.decay, "b t g r k -> b t (g r k)")
        return {**found, "state": self.by_step(given.state)}

    def by_step(self, states: Float[Array, "B G R V K"]) -> Array:
        return rearrange(states, "b (p a) (s r) v k -> b (p s) (a r) v k", a=self.own_groups, r=self.own_shared)

    def by_head(self, states: Array) -> Float[Array, "B G R V K"]:
        return rearrange(states, "b (p s) (a r) v k -> b (p a) (s r) v k", s=self.shares, a=self.own_groups)

    def unrows(self, rows: Array, at: int) -> Array:
        """`heads` rows of small numbers back to where they come from."""
        own = rows[:, :, :, at : at + self.heads]
        return rearrange(own, "b n (p s) (a r) c -> b n (p a) (s r) c", s=self.shares, a=self.own_groups)


OPERANDS = {"q": "pair", "k": "pair", "v": "heads", "small": "small", "steps": "steps", "state": "first"}


def forward(
    given: Operands, size: int, products: Products, keep: bool, interpret: Any = False
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B G R V K"], Any]:
    """What tokens read, in the dtype of v, the state behind them, and with `keep` the states that `backward` takes."""
    cut = _Cut.make(given, size)
    specs, flat = cut.specs(backwards=False), cut.flat(given)
    parts, heads = cut.grid[1] * cut.shares, (cut.heads, cut.width, cut.keys)
    out = [("heads", flat["v"].shape, given.v.dtype), ("last", (cut.batch, parts, *heads), jnp.float32)]
    out += [("kept", (cut.batch, cut.blocks, parts, *heads), jnp.float32)] if keep else []
    found = pl.pallas_call(
        partial(_forward_kernel, cut, products, list(flat)),
        grid=cut.grid,
        in_specs=[specs[OPERANDS[name]] for name in flat],
        out_specs=[specs[name] for name, _, _ in out],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in out],
        scratch_shapes=[pltpu.VMEM((cut.shares, *heads), jnp.float32)],
        compiler_params=_params(),
        interpret=interpret,
        name="recurrence_forward",
    )(*flat.values())
    return found[0].reshape(given.v.shape), cut.by_head(found[1]), found[2] if keep else None


def backward(
    given: Operands,
    kept: Array,
    size: int,
    products: Products,
    d_out: Float[Array, "B T G R V"],
    d_state: Float[Array, "B G R V K"],
    interpret: Any = False,
) -> Operands:
    """Gradients of all operands but segments, in their shapes; those of q, k and decays in float32."""
    cut = _Cut.make(given, size)
    specs, flat = cut.specs(backwards=True), cut.flat(given)
    state = flat.pop("state")
    names = [*flat, "kept", "d_out", "d_state"]
    flat = {**flat, "kept": kept, "d_out": d_out.reshape(flat["v"].shape), "d_state": cut.by_step(d_state)}
    places = {**OPERANDS, "kept": "kept", "d_out": "heads", "d_state": "last"}
    results: list[str] = [name for name in OPERANDS if name in flat]
    shapes = {
        name: jax.ShapeDtypeStruct(flat[name].shape, flat[name].dtype if name == "v" else jnp.float32)
        for name in results
    }
    found = pl.pallas_call(
        partial(_backward_kernel, cut, products._replace(differentiable=True), names, results),
        grid=cut.grid,
        in_specs=[specs[places[name]] for name in names],
        out_specs=[specs[places[name]] for name in results] + [specs["first"]],
        out_shape=[*shapes.values(), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((cut.shares, cut.heads, cut.width, cut.keys), jnp.float32)],
        compiler_params=_params(),
        interpret=interpret,
        name="recurrence_backward",
    )(*(flat[name] for name in names))
    made = dict(zip(results, found, strict=False))
    decay = made["steps"].reshape(given.decay.shape) if cut.channels else cut.unrows(made["small"], 0)
    beta = cut.unrows(made["small"], cut.betas) if cut.delta else None
    q, k, v = (made[name].reshape(x.shape) for name, x in (("q", given.q), ("k", given.k), ("v", given.v)))
    return Operands(q, k, v, decay, None, beta, None, cut.by_head(found[-1]))


def _params() -> Any:
    semantics: Any = ("parallel", "parallel", "arbitrary", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


class _Head(NamedTuple):
    """What `recurrence_block.block` takes of one head, and of all heads with an axis in front."""

    q: Array
    k: Array
    v: Array
    decay: Any
    beta: Array | None
    state: Array


def _heads(cut: _Cut, read: dict[str, Any], states: Array) -> tuple[_Head, Any]:
    """All heads of a step, and segments.

    Small numbers are columns as wide as what they multiply where that is one width: a compiler would widen them anew,
    for each product, by far more than that takes.
    """
    columns: Any = read["small"][...].T if "small" in read else None  # [C, rows]

    def column(row: int, width: int) -> Array:
        narrow = columns[:, row : row + 1]
        return jnp.broadcast_to(narrow, (cut.size, width)) if width == cut.size else narrow

    def lanes(name: str, place: int, width: int) -> Array:
        return read[name][:, _lanes(place, width)].astype(jnp.float32)

    found = []
    for h in range(cut.heads):
        if cut.channels:
            decay: Any = core.ChannelDecay(lanes("steps", h, cut.keys))
        else:
            fine, coarse = ((column(row, cut.keys), read["small"][row : row + 1]) for row in (h, h + cut.heads))
            decay = core.HeadDecay(*fine, *coarse)
        beta = column(h + cut.betas, cut.width) if cut.delta else None
        q, k = (lanes(name, h // cut.own_shared, cut.keys) for name in ("q", "k"))
        found.append(_Head(q, k, lanes("v", h, cut.width), decay, beta, states[h]))
    heads = jax.tree.map(lambda *x: jnp.stack(x), *found)
    if not cut.segmented:
        return heads, None
    at = cut.betas + cut.heads * cut.delta
    rows = columns[:, at : at + 1], read["small"][at : at + 1]
    return heads, core.Segments(*(x.astype(jnp.int32) for x in rows))


def _lanes(place: int, width: int) -> Any:
    return pl.ds(place * width, width)


def _read_heads(products: Products, segments: Any, heads: _Head) -> tuple[Array, Array]:
    """What all heads read, and their states.

    Each product of a head waits for the last. Products of all heads as one let the compiler work on another's
    meanwhile; what is written head after head it leaves in that order.
    """

    def block(h: _Head) -> tuple[Array, Array]:
        return core.block(products, h.q, h.k, h.v, h.decay, h.beta, h.state, segments)

    found: tuple[Array, Array] = jax.vmap(block)(heads)
    return found


def _forward_kernel(cut: _Cut, products: Products, names: list[str], *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    out, last, *kept, held = refs[len(names) :]
    n, share = pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _() -> None:
        held[share] = read["state"][...]

    if kept:
        kept[0][...] = held[share]
    heads, segments = _heads(cut, read, held[share])
    found, held[share] = _read_heads(products, segments, heads)
    for h in range(cut.heads):
        out[:, _lanes(h, cut.width)] = found[h].astype(out.dtype)

    @pl.when(n == cut.blocks - 1)
    def _() -> None:
        last[...] = held[share]


def _backward_kernel(cut: _Cut, products: Products, names: list[str], results: list[str], *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    write = dict(zip(results, refs[len(names) :], strict=False))
    first, held = refs[-2:]
    n, share = pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _() -> None:
        held[share] = read["d_state"][...]

    heads, segments = _heads(cut, read, read["kept"][...])
    call: Any = partial(_read_heads, products, segments)
    _, pull = jax.vjp(call, heads)
    d_out = jnp.stack([read["d_out"][:, _lanes(h, cut.width)].astype(jnp.float32) for h in range(cut.heads)])
    (d,) = pull((d_out, held[share]))
    held[share] = d.state
    for g in range(cut.own_groups):
        for name, value in (("q", d.q), ("k", d.k)):
            own = jnp.sum(value[g * cut.own_shared : (g + 1) * cut.own_shared], axis=0)
            _add(write[name], _lanes(g, cut.keys), own, share, cut.shares)
    turned = jnp.zeros((cut.size, cut.columns()), jnp.float32)  # gradients of columns of small numbers
    place = jax.lax.broadcasted_iota(jnp.int32, turned.shape, 1)
    if "small" in write:
        write["small"][...] = jnp.zeros(write["small"].shape, jnp.float32)
    for h in range(cut.heads):
        write["v"][:, _lanes(h, cut.width)] = d.v[h].astype(write["v"].dtype)
        columns = {}
        if cut.channels:
            write["steps"][:, _lanes(h, cut.keys)] = d.decay.steps[h]
        else:
            write["small"][h : h + 1] = d.decay.row[h]
            columns[h] = d.decay.column[h]
        if cut.delta:
            columns[h + cut.betas] = d.beta[h]
        for row, column in columns.items():
            turned = jnp.where(place == row, jnp.sum(column, axis=1, keepdims=True), turned)
    if "small" in write:
        write["small"][...] += turned.T

    @pl.when(n == cut.blocks - 1)
    def _() -> None:
        first[...] = held[share]


def _add(ref: Any, lanes: Any, value: Array, share: Any, shares: int) -> None:
    """Write a share of a sum over the last axis of the grid."""
    if shares == 1:
        ref[:, lanes] = value
        return

    @pl.when(share == 0)
    def _() -> None:
        ref[:, lanes] = value

    @pl.when(share > 0)
    def _() -> None:
        ref[:, lanes] += value
