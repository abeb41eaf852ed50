"""Recurrences over matrix states on GPUs, in Triton, a block of tokens at a time, forwards and backwards.

Only the state goes from block to block: in programs that hold some columns of a head's state in registers. All else is
made for all blocks at once, a program a block and head. Forwards

    erasing    what the delta rule's tokens write, of what they would behind the first state: the inverse of 1 + M
    states     from block to block: the state in front of each, and what its tokens write
    outputs    what tokens read of both

and backwards the cotangents of the last, of the states from the last block to the first, and of the second's operands,
whose kernels go over a few columns of a block's values and state at a time, so that threads spill less. A head's
gradients of the query and the key that several heads share are added up by XLA.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import recurrence_block as core
from pallas_kernels.recurrence_block import Operands
from pallas_kernels.recurrence_products import Products

MAX_STATE = 128  # rows and columns of a state
COLUMNS = 32  # of a state, of a program that goes from block to block
# Of a program, 4 of others, and what makes the pairs of channels' decays in a loop: what spills least on an H100. Where
# all levels of pairs are unrolled in `write_gradients`, a thread spills 109 KB.
WARPS = {"output_gradients": 8, "state_gradients": 8}
CHANNEL_WARPS = {**WARPS, "write_gradients": 8}
ROLLED = {"erasing", "write_gradients"}
AXES = {  # b: rows of the batch, t: tokens, n: blocks, c: a block's tokens, g, h: groups and heads, k, v: as in a state
    "q": "btgk",
    "k": "btgk",
    "v": "bthv",
    "decay": "bnhc",
    "steps": "bthk",
    "coarse": "bnhc",
    "beta": "bnhc",
    "segments": "bnc",
    "inverse": "bnhcc",
    "state": "bhvk",
    "kept": "bnhvk",
    "d_pair": "bthk",
}


def block_size(channels: bool, length: int) -> int:
    """How many tokens a block has."""
    return min(32 if channels else 64, max(16, 1 << (length - 1).bit_length()))


class _Call(NamedTuple):
    """What all kernels of a call share: tokens of a block, products, and the operands with all heads in one axis."""

    size: int
    products: Products
    interpret: Any
    arrays: dict[str, Array]

    @classmethod
    def make(cls, given: Operands, size: int, products: Products, interpret: Any) -> _Call:
        channels = given.decay.shape[1] == given.q.shape[1]  # blocks have more tokens than one
        beta, segments = given.beta, given.segments
        arrays = {"q": given.q, "k": given.k, "v": rearrange(given.v, "b t g r v -> b t (g r) v")}
        arrays["steps" if channels else "decay"] = rearrange(given.decay, "b n g r d -> b n (g r) d")
        arrays |= {} if given.coarse is None else {"coarse": rearrange(given.coarse, "b n g r c -> b n (g r) c")}
        arrays |= {} if beta is None else {"beta": rearrange(beta, "b n g r c -> b n (g r) c")}
        arrays |= {} if segments is None else {"segments": segments}
        return cls(size, products, interpret, {**arrays, "state": rearrange(given.state, "b g r v k -> b (g r) v k")})

    @property
    def plain(self) -> Products:
        """Products of what is not differentiated: Triton has no call of a function with a derivative of its own."""
        return self.products._replace(differentiable=False)

    def run(self, name: str, kernel: Any, reads: dict[str, Array], makes: dict[str, Any], walks: bool) -> Any:
        """One kernel, which reads all operands and `reads`.

        Args:
          kernel: of the call, the operands' refs by name, and those of results.
          reads: named as in `AXES`, with `:` and another name behind for others laid out so.
          makes: results with their dtypes, named in the same way.
          walks: a program goes from block to block with some columns of a state; else there is one for each block.
        """
        batch, length, heads, width = self.arrays["v"].shape
        groups, keys = self.arrays["q"].shape[2:]
        blocks, columns = length // self.size, min(COLUMNS, width) if walks else width
        sizes = {"b": batch, "t": length, "n": blocks, "c": self.size, "g": groups, "h": heads, "k": keys, "v": width}
        taken = {**dict.fromkeys("bgh"), "t": length if walks else self.size, "n": blocks if walks else None}
        taken |= {"c": self.size, "k": keys, "v": columns}

        def spec(name: str) -> Any:
            axes = AXES[name.partition(":")[0]]

            def index(b: Any, h: Any, i: Any) -> tuple[Any, ...]:
                at = {"b": b, "h": h, "g": jax.lax.div(h, jnp.int32(heads // groups)), "c": 0, "k": 0}
                at |= {"t": 0, "n": 0, "v": i} if walks else {"t": i, "n": i, "v": 0}
                return tuple(at[axis] for axis in axes)

            return pl.BlockSpec(tuple(taken[axis] for axis in axes), index)

        def shape(name: str, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in AXES[name.partition(":")[0]]), dtype)

        given, channels = {**self.arrays, **reads}, "steps" in self.arrays
        call = self._replace(products=self.products._replace(rolled=channels and name in ROLLED))
        warps = (CHANNEL_WARPS if channels else WARPS).get(name, 4)
        return pl.pallas_call(
            partial(_by_name, kernel, call, blocks, list(given), list(makes)),
            grid=(batch, heads, width // columns if walks else blocks),
            in_specs=[spec(name) for name in given],
            out_specs=[spec(name) for name in makes],
            out_shape=[shape(*item) for item in makes.items()],
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
            interpret=self.interpret,
            name=f"recurrence_{name}",
        )(*given.values())


def _by_name(kernel: Any, call: _Call, blocks: int, reads: list[str], makes: list[str], *refs: Any) -> None:
    kernel(call, blocks, dict(zip([*reads, *(f"new {name}" for name in makes)], refs, strict=True)))


def forward(
    given: Operands, size: int, products: Products, keep: bool, interpret: Any = False
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B G R V K"], Any]:
    """What tokens read, in the dtype of v, the state behind them, and with `keep` what `backward` takes."""
    call = _Call.make(given, size, products, interpret)
    dtype = given.v.dtype
    more, makes = {}, {"kept": jnp.float32, "state": jnp.float32}
    if given.beta is not None:
        more["inverse"] = call.run("erasing", _erasing, {}, {"inverse": dtype}, walks=False)[0]
        makes["v:values"] = dtype
    kept, state, *values = call.run("states", _states, more, makes, walks=True)
    more = {"kept": kept, "v:values": values[0] if values else call.arrays["v"]}
    out = call.run("outputs", _outputs, more, {"v:out": dtype}, walks=False)[0]
    return out.reshape(given.v.shape), state.reshape(given.state.shape), kept if keep else None


def backward(
    given: Operands,
    kept: Array,
    size: int,
    products: Products,
    d_out: Float[Array, "B T G R V"],
    d_state: Float[Array, "B G R V K"],
    interpret: Any = False,
) -> Operands:
    """Gradients of all operands but segments, in their shapes."""
    call = _Call.make(given, size, products._replace(differentiable=True), interpret)
    more = {"kept": kept, "v:out": d_out.reshape(call.arrays["v"].shape)}
    if given.beta is not None:
        more["inverse"] = call.run("erasing", _erasing, {}, {"inverse": given.v.dtype}, walks=False)[0]
    decay, wide = "steps" if "steps" in call.arrays else "decay", jnp.float32
    makes = {"d_pair:q": wide, "d_pair:k": wide, decay: wide, "v:values": wide, "kept:read": wide}
    d_q, d_k, d_decay, d_values, d_read = call.run("output_gradients", _output_gradients, more, makes, walks=False)
    more |= {"v:values": d_values, "kept:read": d_read, "state:last": d_state.reshape(call.arrays["state"].shape)}
    d_kept, d_first = call.run("state_gradients", _state_gradients, more, {"kept": wide, "state": wide}, walks=True)
    makes = {"d_pair:k": wide, "v": given.v.dtype, decay: wide} | ({} if given.beta is None else {"beta": wide})
    more |= {"kept:behind": d_kept}
    d_key, d_v, d_own, *d_beta = call.run("write_gradients", _write_gradients, more, makes, walks=False)

    def shared(x: Array) -> Array:
        return jnp.sum(rearrange(x, "b t (g r) k -> b t g r k", g=given.q.shape[2]), axis=3)

    beta = d_beta[0].reshape(given.beta.shape) if given.beta is not None else None
    decays = (d_decay + d_own).reshape(given.decay.shape)
    v, state = d_v.reshape(given.v.shape), d_first.reshape(given.state.shape)
    return Operands(shared(d_q), shared(d_k + d_key), v, decays, None, beta, None, state)


class _Block(NamedTuple):
    """What a program has of a block: `beta` and decays of a head are vectors."""

    k: Array
    v: Array
    decay: Array
    coarse: Array | None
    beta: Array | None
    inverse: Array | None


def _read(call: _Call, refs: dict[str, Any], n: Any = None) -> tuple[_Block, Any]:
    """A program's own block, or block n of those that it goes through."""

    def load(name: str) -> Any:
        if name not in refs:
            return None
        at = ... if n is None else pl.ds(n * call.size, call.size) if AXES[name][1] == "t" else n
        found = refs[name][at]
        return found if found.dtype == jnp.int32 else found.astype(jnp.float32)

    decay = load("steps" if "steps" in refs else "decay")
    segments = load("segments")
    both = None if segments is None else core.Segments(segments[:, None], segments[None])
    return _Block(load("k"), load("v"), decay, load("coarse"), load("beta"), load("inverse")), both


def _weights(products: Products, decay: Array, coarse: Array | None, segments: Any) -> core.Weights:
    if coarse is None:
        return core.weights(products, core.ChannelDecay(decay), segments)
    return core.weights(products, core.HeadDecay(decay[:, None], decay[None], coarse[:, None], coarse[None]), segments)


def _erasing(call: _Call, blocks: int, refs: dict[str, Any]) -> None:
    own, segments = _read(call, refs)
    weights = _weights(call.plain, own.decay, own.coarse, segments)
    found = core.erasing(call.plain, own.k, own.beta[:, None], weights, segments)  # type: ignore[index]
    refs["new inverse"][...] = found.astype(refs["new inverse"].dtype)


def _states(call: _Call, blocks: int, refs: dict[str, Any]) -> None:
    def step(n: Any, state: Array) -> Array:
        own, segments = _read(call, refs, n)
        refs["new kept"][n] = state
        values, state = _write(call.products, segments, own, state)
        if "new v:values" in refs:
            refs["new v:values"][pl.ds(n * call.size, call.size)] = values.astype(refs["new v:values"].dtype)
        return state

    refs["new state"][...] = jax.lax.fori_loop(0, blocks, step, refs["state"][...])


def _write(
    products: Products, segments: Any, own: _Block, state: Array, weights: core.Weights | None = None
) -> tuple[Array, Array]:
    """What a block's tokens write, and the state behind them; `weights` are made where they are not given."""
    found = _weights(products, own.decay, own.coarse, segments) if weights is None else weights
    values = _written(products, own, found, own.v, state)
    return values, core.next_state(products, own.k, values, found, state)


def _written(products: Products, own: _Block, found: core.Weights, v: Array, state: Array) -> Array:
    """What a block's tokens write to some columns of the state."""
    if own.beta is None:
        return v
    assert own.inverse is not None
    return core.written(products, own.k, v, own.beta[:, None], own.inverse, found, state)


def _outputs(call: _Call, blocks: int, refs: dict[str, Any]) -> None:
    own, segments = _read(call, refs)
    q, values = (refs[name][...].astype(jnp.float32) for name in ("q", "v:values"))
    found = _weights(call.products, own.decay, own.coarse, segments)
    pairs = core.scores(call.products, q, own.k, found, segments, True)
    out = core.read(call.products, q, pairs, values, found, refs["kept"][...])
    refs["new v:out"][...] = out.astype(refs["new v:out"].dtype)


def _over_columns(columns: Any, refs: dict[str, Any], like: Any) -> Any:
    """Sums, shaped as `like`, over some columns of values and of the state at a time: so a thread holds few of them."""
    width = refs["v"].shape[-1]
    part = min(COLUMNS, width)

    def step(i: Any, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, columns(pl.ds(i * part, part)))

    return jax.lax.fori_loop(0, width // part, step, jax.tree.map(jnp.zeros_like, like))


def _output_gradients(call: _Call, blocks: int, refs: dict[str, Any]) -> None:
    """A few columns of values and of the state at a time, as `_write_gradients` has them."""
    own, segments = _read(call, refs)
    products, q = call.products, refs["q"][...].astype(jnp.float32)

    def shared(q: Array, k: Array, decay: Array) -> tuple[core.Weights, Array]:
        found = _weights(products, decay, own.coarse, segments)
        return found._replace(pairs=None), core.scores(products, q, k, found, segments, True)

    def columns(at: Any) -> Any:
        state, v, given = refs["kept"][at], refs["v"][:, at].astype(jnp.float32), refs["v:out"][:, at]
        values = _written(call.plain, own, found, v, state)
        read = partial(core.read, products)
        *parts, d_values, d_found, d_state = jax.vjp(read, q, pairs, values, found, state)[1](given.astype(jnp.float32))
        refs["new v:values"][:, at], refs["new kept:read"][at] = d_values, d_state
        return *parts, d_found

    (found, pairs), pull = jax.vjp(shared, q, own.k, own.decay)
    d_q, d_pairs, d_found = _over_columns(columns, refs, (q, pairs, found))
    more, d_k, d_decay = pull((d_found, d_pairs))
    refs["new d_pair:q"][...], refs["new d_pair:k"][...] = d_q + more, d_k
    refs["new steps" if "steps" in refs else "new decay"][...] = d_decay


def _state_gradients(call: _Call, blocks: int, refs: dict[str, Any]) -> None:
    def step(i: Any, behind: Array) -> Array:
        n = blocks - 1 - i
        own, segments = _read(call, refs, n)
        refs["new kept"][n] = behind
        weights = _weights(call.plain, own.decay, own.coarse, segments)  # no state is in them: see `_Call.plain`
        write = partial(_write, call.products, segments, own, weights=weights)
        _, pull = jax.vjp(write, jnp.zeros_like(behind))
        return refs["kept:read"][n] + pull((refs["v:values"][pl.ds(n * call.size, call.size)], behind))[0]

    refs["new state"][...] = jax.lax.fori_loop(0, blocks, step, refs["state:last"][...])


def _write_gradients(call: _Call, blocks: int, refs: dict[str, Any]) -> None:
    """A few columns of values and of the state at a time; what these share is differentiated behind them."""
    own, segments = _read(call, refs)
    products = call.products

    def shared(k: Array, decay: Array, beta: Array | None) -> tuple[core.Weights, Array | None]:
        found, inverse = _weights(products, decay, own.coarse, segments), None
        if beta is not None:
            inverse = core.erasing(products, k, beta[:, None], found, segments, own.inverse)
        return found._replace(pairs=None), inverse

    def columns(at: Any) -> Any:
        state, v = refs["kept"][at], refs["v"][:, at].astype(jnp.float32)

        def write(k: Array, beta: Any, inverse: Any, found: core.Weights, v: Array) -> tuple[Array, Array]:
            values = _written(products, own._replace(k=k, beta=beta, inverse=inverse), found, v, state)
            return values, core.next_state(products, k, values, found, state)

        *parts, d_v = jax.vjp(write, *given, found, v)[1]((refs["v:values"][:, at], refs["kept:behind"][at]))
        refs["new v"][:, at] = d_v.astype(refs["new v"].dtype)
        return tuple(parts)

    given = own.k, own.beta, own.inverse
    found = _weights(call.plain, own.decay, own.coarse, segments)._replace(pairs=None)
    own_k, own_beta, d_inverse, d_found = _over_columns(columns, refs, (*given, found))
    d_k, d_decay, d_beta = jax.vjp(shared, own.k, own.decay, own.beta)[1]((d_found, d_inverse))
    refs["new d_pair:k"][...] = own_k + d_k
    refs["new steps" if "steps" in refs else "new decay"][...] = d_decay
    if d_beta is not None:
        refs["new beta"][...] = own_beta + d_beta
