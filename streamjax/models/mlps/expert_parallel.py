"""Experts on a mesh: each device has some of the experts, and sends every token through those of its own.

Mesh axes are taken by hand (`jax.shard_map`), as for kernels (`streamjax.attention.sharded`). Rows of a batch lie over
data, fsdp and expert; experts over expert, their channels over tensor, and over fsdp while they are not used. A layer
gathers the tokens of the devices along expert, sorts those choices that are its own, and a reduce-scatter along expert
sums what the devices have made of each token and returns it. So a device receives `(P - 1) * tokens * E` numbers before
and as many after the experts, for P devices along expert and the tokens of one. An all-to-all that sends a token once
for each of its A experts would receive `(P - 1) / P * A` for every `P - 1` here, which is less only where P is more
than A; its buffers are as large, for no token may be dropped. Experts' weights never cross the expert axis.

How many choices fall to a device is known at run time alone, and all may. Memory is that of a fair share and a quarter
more: choices are worked off in pieces, as many as there are. The backward pass walks the pieces again, and keeps of the
forward pass nothing but its inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.models.config import ExpertsConfig
from streamjax.models.mlps.sorted_experts import ExpertWeights, sorted_mlp, sum_of_choices
from streamjax.parallel.rules import axes_of, free_spec

Carry = TypeVar("Carry")

# Of `ExpertWeights`, in order: logical names of the dimensions, and which of these fsdp splits.
_NAMES = (
    ("expert", "embed", "gates", "mlp"),
    ("expert", "mlp", "embed"),
    ("expert", "gates", "mlp"),
    ("expert", "activation_embed"),
)
_EMBED = (1, 2, None, None)
_LEAST, _SLACK, _ROUND = 1024, 1.25, 128  # choices of a piece: at least, over a fair share, a multiple


@dataclasses.dataclass(frozen=True)
class Placement:
    """Who has what.

    free: mesh axes that are taken by hand here; some may have been taken around (`gradient_reduction.over_rows`).
    tokens: how they split [B, T]. weights: how they split each array.
    experts: the devices along expert have different experts. gathers: and different tokens.
    """

    mesh: AbstractMesh
    free: frozenset[str]
    tokens: PartitionSpec
    weights: ExpertWeights
    experts: bool
    gathers: bool

    @classmethod
    def on_current_mesh(cls, weights: ExpertWeights, rows: int, length: int, experts: int) -> Placement | None:
        """Under the mesh of `jax.set_mesh`; None where one device computes by itself."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return None
        free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
        taken = weights.up.shape[0] < experts  # around, with tokens split as experts are
        if not taken and all(mesh.shape[axis] == 1 for axis in free):
            return None
        tokens = free_spec(("batch", "length"), (rows, length), mesh)
        specs = [
            None if x is None else free_spec(names, x.shape, mesh) for names, x in zip(_NAMES, weights, strict=True)
        ]
        split = taken or "expert" in _axes(specs[0])
        gathers = split and (taken or "expert" in _axes(tokens))
        return cls(mesh, free, tokens, ExpertWeights._make(specs), split, gathers)

    @property
    def first(self) -> Any:
        """Which of the parts of the experts is this device's."""
        return jax.lax.axis_index("expert") if self.experts else 0

    @property
    def tensor(self) -> bool:
        """Whether the devices along tensor have different channels of the experts."""
        return "tensor" in _axes(self.weights.up)

    @property
    def fsdp(self) -> bool:
        """Whether weights are to be gathered along fsdp."""
        return "fsdp" in _axes(self.weights.up)

    def shard_map(self, fn: Callable[..., Any], arrays: tuple[Any, ...], out: Any) -> Any:
        """`fn(weights, *arrays)` by each device; `out` has True in the place of tokens, False in that of weights."""
        specs = (self.weights, *(self.tokens for _ in arrays[1:]))
        out_specs = tuple(self.tokens if is_tokens else self.weights for is_tokens in out)
        if not self.free:
            return fn(*arrays)
        return jax.shard_map(
            fn, mesh=self.mesh, axis_names=set(self.free), in_specs=specs, out_specs=out_specs, check_vma=False
        )(*arrays)

    def all_tokens(self, x: Array) -> Array:
        """What the devices along expert have of the rows, one after the other: [B, T, ...] -> [N, ...]."""
        x = jax.lax.all_gather(x, "expert", axis=0, tiled=True) if self.gathers else x
        return x.reshape(-1, x.shape[-1])

    def total(self, x: Float[Array, "N W"], like: Array) -> Float[Array, "B T W"]:
        """Sums over what each device has made of a token, where the token is; the inverse of `all_tokens`."""
        x = x.astype(like.dtype).reshape(-1, *like.shape[1:])
        axes = ["tensor"] * self.tensor
        if self.gathers:
            x = jax.lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True)
        elif self.experts:
            axes.append("expert")
        return jax.lax.psum(x, tuple(axes)) if axes else x

    def whole(self, weights: ExpertWeights, dtype: jnp.dtype) -> ExpertWeights:
        """The device's own experts, all of their channels but for those that tensor splits, in `dtype`."""

        def gather(x: Any, dim: int | None) -> Array | None:
            x = None if x is None else x.astype(dtype)
            return (
                x if x is None or dim is None or not self.fsdp else jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)
            )

        found = ExpertWeights._make(gather(x, dim) for x, dim in zip(weights, _EMBED, strict=True))
        if found.down_bias is None or not self.tensor:
            return found
        return found._replace(down_bias=found.down_bias * (jax.lax.axis_index("tensor") == 0))  # to be summed once

    def own(self, grads: ExpertWeights, like: ExpertWeights) -> ExpertWeights:
        """Gradients of `whole` weights summed over the devices that share them, split as they are."""
        sums = [axis for axis in _axes(self.tokens) if not (axis == "expert" and self.experts)]

        def total(x: Any, old: Any, dim: int | None) -> Array | None:
            if x is None or old is None:
                return None
            x, over = x.astype(old.dtype), list(sums)
            if self.fsdp and dim is not None:
                x = x if "fsdp" in sums else x / self.mesh.shape["fsdp"]  # all have the same sum
                x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=dim, tiled=True)
                over = [axis for axis in sums if axis != "fsdp"]
            return jax.lax.psum(x, tuple(over)) if over else x

        return ExpertWeights._make(total(*each) for each in zip(grads, like, _EMBED, strict=True))


class Piece(NamedTuple):
    """Some of a device's own choices, sorted by expert: places in [N, A], their tokens and experts (counted from the
    device's first), which of them there are, and how many each expert has."""

    choices: Int32[Array, " R"]
    tokens: Int32[Array, " R"]
    experts: Int32[Array, " R"]
    there: Bool[Array, " R"]
    sizes: Int32[Array, " X"]


class OwnChoices:
    """Those of all tokens' choices that fall to one device's experts, to be worked off in pieces."""

    def __init__(self, experts: Int32[Array, "N A"], first: Any, count: int, num_experts: int):
        tokens, self.each = experts.shape
        most = tokens * min(self.each, count)
        fair = _SLACK * tokens * self.each * count / num_experts
        self.size = min(most, max(_LEAST, math.ceil(fair / _ROUND) * _ROUND))
        self.pieces = math.ceil(most / self.size)
        local = experts.reshape(-1) - first * count
        self.experts = jnp.where((local >= 0) & (local < count), local, count)  # others' choices behind all
        order = jnp.argsort(self.experts)[:most]
        self.order = jnp.pad(order, (0, self.pieces * self.size - most))
        self.sizes = jnp.bincount(self.experts, length=count + 1)[:count].astype(jnp.int32)
        self.ends = jnp.cumsum(self.sizes)

    def piece(self, i: Any) -> Piece:
        start = i * self.size
        choices = jax.lax.dynamic_slice_in_dim(self.order, start, self.size)
        ends, starts = (jnp.clip(x - start, 0, self.size) for x in (self.ends, self.ends - self.sizes))
        experts = jnp.minimum(self.experts[choices], len(self.sizes) - 1)
        there = start + jnp.arange(self.size) < self.ends[-1]
        return Piece(choices, choices // self.each, experts, there, ends - starts)

    def walk(self, body: Callable[[Piece, Carry], Carry], carry: Carry) -> Carry:
        """`carry = body(piece, carry)` for as many pieces as hold choices."""
        if self.pieces == 1:
            return body(self.piece(0), carry)
        count = -(-self.ends[-1] // self.size)
        return jax.lax.fori_loop(0, count, lambda i, carry: body(self.piece(i), carry), carry)


def sum_on_mesh(
    weights: ExpertWeights,
    x: Float[Array, "B T E"],
    experts: Int32[Array, "B T A"],
    shares: Float[Array, "B T A"],
    config: ExpertsConfig,
) -> Float[Array, "B T E"]:
    """What the chosen experts make of each token, summed with their shares, on whatever devices they are.

    Args:
      weights: of all experts, or of this device's own where the expert axis was taken by hand around this call.
      x, experts, shares: tokens, the experts that each has chosen, and their weights.
      config: how an expert computes, and how many there are.
    """
    place = Placement.on_current_mesh(weights, x.shape[0], x.shape[1], config.num_experts)
    if place is None:
        tokens, experts, shares = (a.reshape(-1, a.shape[-1]) for a in (x, experts, shares))
        return sum_of_choices(weights, tokens, experts, shares, config).reshape(x.shape)
    return _sum(place, config, weights.dequantised(x.dtype), x, experts, shares)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(
    place: Placement, config: ExpertsConfig, weights: ExpertWeights, x: Array, experts: Array, shares: Array
) -> Array:
    def compute(weights: ExpertWeights, x: Array, experts: Array, shares: Array) -> tuple[Array]:
        own, whole = _own_choices(place, config, weights, experts), place.whole(weights, x.dtype)
        tokens, each = place.all_tokens(x), place.all_tokens(shares).reshape(-1)

        def add(piece: Piece, y: Array) -> Array:
            return y.at[piece.tokens].add(_made(whole, tokens[piece.tokens], each[piece.choices], piece, config))

        y = own.walk(add, jnp.zeros(tokens.shape, accumulator(x.dtype)))
        return (place.total(y, x),)

    return place.shard_map(compute, (weights, x, experts, shares), (True,))[0]


def _forward(place: Placement, config: ExpertsConfig, *arrays: Any) -> tuple[Array, tuple[Any, ...]]:
    return _sum(place, config, *arrays), arrays


def _backward(place: Placement, config: ExpertsConfig, saved: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    def compute(weights: ExpertWeights, x: Array, experts: Array, shares: Array, d_y: Array) -> tuple[Any, ...]:
        own, whole = _own_choices(place, config, weights, experts), place.whole(weights, x.dtype)
        tokens, each, d_all = place.all_tokens(x), place.all_tokens(shares).reshape(-1), place.all_tokens(d_y)
        wide = accumulator(x.dtype)

        def add(piece: Piece, carry: tuple[ExpertWeights, Array, Array]) -> tuple[ExpertWeights, Array, Array]:
            d_weights, d_tokens, d_shares = carry
            primals = jax.tree.map(lambda w: w.astype(wide), whole)  # cast back where it is used: gradients stay wide
            _, pull = jax.vjp(
                lambda w, rows, shares: _made(w, rows, shares, piece, config),
                primals, tokens[piece.tokens], each[piece.choices],
            )  # fmt: skip
            more, d_rows, d_each = pull(d_all[piece.tokens].astype(wide))
            return (
                jax.tree.map(jnp.add, d_weights, more),
                d_tokens.at[piece.tokens].add(d_rows.astype(wide)),
                d_shares.at[piece.choices].add(d_each),
            )

        nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, wide), whole), jnp.zeros(tokens.shape, wide)
        d_weights, d_tokens, d_shares = own.walk(add, (*nothing, jnp.zeros_like(each)))
        d_shares = d_shares.reshape(-1, shares.shape[-1])
        return place.own(d_weights, weights), place.total(d_tokens, x), place.total(d_shares, shares)

    d_weights, d_x, d_shares = place.shard_map(compute, (*saved, cotangent), (False, True, True))
    return d_weights, d_x, None, d_shares


_sum.defvjp(_forward, _backward)


def _own_choices(place: Placement, config: ExpertsConfig, weights: ExpertWeights, experts: Array) -> OwnChoices:
    return OwnChoices(place.all_tokens(experts), place.first, weights.up.shape[0], config.num_experts)


def _made(
    weights: ExpertWeights, rows: Float[Array, "R E"], shares: Float[Array, " R"], piece: Piece, config: ExpertsConfig
) -> Float[Array, "R E"]:
    """What a piece adds to the sums of its tokens."""
    if config.weighted == "inputs":
        rows, shares = (rows * shares[:, None]).astype(rows.dtype), jnp.ones_like(shares)
    out = sorted_mlp(weights, rows, piece.experts, piece.sizes, config)
    return jnp.where(piece.there[:, None], out.astype(shares.dtype) * shares[:, None], 0)


def _axes(spec: Any) -> tuple[str, ...]:
    """The mesh axes of a PartitionSpec."""
    return tuple(axis for entry in spec for axis in axes_of(entry))
