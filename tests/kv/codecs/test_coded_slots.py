from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import streamjax as sj
from benchmarks.aot import copied_bytes
from streamjax.kv.codecs.slotwise import SlotwiseSlots
from streamjax.kv.codecs.stores import stores
from tests.oracles.codecs import by_token, kivi

Int, FP8, CQ, Codebooks = sj.kv.Int, sj.kv.FP8, sj.kv.CQ, sj.kv.Codebooks
GROUP, WIDTH, SLOTS = 8, 11, 48
CODECS = {"int8": Int(8, group=GROUP), "int2": Int(2, group=GROUP, residual=2 * GROUP, fit="error"), "fp8": FP8()}
CODECS |= {
    "block floats": sj.kv.BlockFloats(4, block=4, group=GROUP),
    "fireq": sj.kv.FireQ(4, group=GROUP, top=1),
    "hadamard": sj.kv.Hadamard(Int(4, group=GROUP)),
    "mixed": sj.kv.Mixed(GROUP, transform=False),
    "cq": CQ(
        2,
        2,
        Codebooks(
            *(np.random.default_rng(i).normal(size=(4, 4, 2)).astype(np.float32).tobytes() for i in (5, 6)), 2, ""
        ),
    ),
}


@partial(jax.jit, static_argnames="width")
def write(both, tokens, start, count, width):
    return tuple(slots.write(tokens[:, :, :width], start, count) for slots in both)


dense = jax.jit(lambda slots: slots.dense())


@lru_cache
def empty(codec):
    return jax.jit(lambda: stores(jnp.zeros((2, 1, SLOTS, 8)), jnp.zeros((2, 1, SLOTS, 8)), codec))()


def streamed(codec, x, cuts):
    """Keys and values of two rows [2, n, D], in chunks of 0 to WIDTH tokens of each; one at a time where all are 1."""
    k, v = empty(codec)
    at = np.zeros(2, int)
    for sizes in cuts:
        sizes = np.minimum(sizes, x.shape[1] - at)
        width = 1 if max(sizes) <= 1 else WIDTH
        offset = np.minimum(1, width - sizes)  # a run may begin anywhere in its chunk
        chunk = np.full((2, 1, WIDTH, 8), 99, np.float32)
        for row in range(2):
            chunk[row, 0, offset[row] : offset[row] + sizes[row]] = x[row, at[row] : at[row] + sizes[row]]
        k, v = write((k, v), chunk, offset.astype(np.int32), sizes.astype(np.int32), width)
        at += sizes
    assert (at == x.shape[1]).all()
    return k, v


def whole(length):
    return [(WIDTH - 1,) * 2] * (length // (WIDTH - 1) + 1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "block floats" else ()) for name in CODECS]
)
@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(data=st.data(), length=st.integers(0, 100))
def test_what_is_stored_does_not_depend_on_the_cut(name, data, length):
    x = np.random.default_rng(length).normal(size=(2, length, 8)).astype(np.float32)
    sizes = st.integers(0, WIDTH)
    cuts = data.draw(st.lists(st.tuples(sizes, sizes), max_size=12)) + [(1, 1)] * 3 + whole(length)
    one, other = streamed(CODECS[name], x, cuts), streamed(CODECS[name], x, whole(length))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_slots_that_hold_nothing_stand_for_numbers():
    """What is masked is multiplied by 0 all the same."""
    for codec in CODECS.values():
        for slots in empty(codec):
            assert np.isfinite(dense(slots)).all()


@pytest.mark.parametrize("name", ["int8", "int2"])
@pytest.mark.parametrize("length", [5, 8, 47, 48, 91])
def test_slots_hold_what_a_plain_loop_says(name, length):
    codec = CODECS[name]
    x = np.random.default_rng(1).normal(size=(2, length, 8)).astype(np.float32)
    for role, slots in zip("kv", streamed(codec, x, whole(length)), strict=True):
        found = np.asarray(dense(slots))
        for row in range(2):
            held = kivi(x[row], codec.bits, GROUP, codec.residual, role == "k", codec.fit)
            for token in range(max(0, length - SLOTS + GROUP), length):
                np.testing.assert_array_equal(found[row, 0, token % SLOTS], held[token], err_msg=f"{role} {token}")


@pytest.mark.slow
def test_of_gear_codes_are_the_same_however_a_stream_is_cut_and_factors_to_their_last_bits():
    codec = sj.kv.Gear(2, group=GROUP, rank=1, outliers=1)
    x = np.random.default_rng(2).normal(size=(2, 30, 8)).astype(np.float32)
    one, other = streamed(codec, x, [(7, 1), (3, 10)] + [(1, 1)] * 8 + whole(30)), streamed(codec, x, whole(30))
    for a, b in zip(one, other, strict=True):
        for found, expected in zip((a.codes, *a.numbers[:4]), (b.codes, *b.numbers[:4]), strict=True):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(dense(a), dense(b), atol=0.02)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_single_slots_are_written_over(bits):
    rng = np.random.default_rng(bits)
    slots = SlotwiseSlots.empty(Int(bits, group=8).one_by_one(), "k", jnp.zeros((1, 2, 13, 8)))
    plain = np.zeros((1, 2, 13, 8), np.float32)
    put = jax.jit(lambda slots, x, at: slots.put(x, at))
    for _ in range(6):
        x = rng.normal(size=(1, 2, 5, 8)).astype(np.float32)
        at = np.stack([rng.permutation(14)[:5] for _ in range(2)])[None].astype(np.int32)  # 13 is past the end
        slots = put(slots, x, at)
        for head, place in np.ndindex(2, 5):
            if at[0, head, place] < 13:
                plain[0, head, at[0, head, place]] = by_token(x[0, head, place : place + 1], bits, 8)[0]
    np.testing.assert_array_equal(dense(slots), plain)
    np.testing.assert_array_equal(slots.take(jnp.asarray([[[12, 0, 7]]])), plain[:, :, [12, 0, 7]])


@pytest.mark.parametrize("tier", [sj.kv.Full(8192, codec=Int(8)), sj.kv.Window(8100, codec=Int(4, residual=64))])
def test_a_token_is_stored_in_place(tier):
    """A CPU copies no codes while no group is full; other compilers are asked by `benchmarks.kernels.coded_traffic`."""
    spec = sj.kv.KVSpec(1, 2, 64, jnp.dtype(jnp.float32))
    state = jax.eval_shape(lambda: tier.init(spec))
    x, number = jax.ShapeDtypeStruct((1, 2, 1, 64), jnp.float32), jax.ShapeDtypeStruct((1, 1, 1), jnp.uint32)

    def store(state, x, position):
        return tier.store(state, sj.kv.KVTokens(x, x, x, position, jnp.ones(position.shape, bool)))

    compiled = jax.jit(store, donate_argnums=0).lower(state, x, number).compile()
    always = compiled.as_text().partition("\nENTRY")[2]  # and not what stands in a branch
    assert copied_bytes("ENTRY" + always, at_least=state.k.codes.size // 2) == 0


@pytest.mark.parametrize(
    "name", ["mixed", "cq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int2", "block floats", "fireq"))]
)
def test_a_decode_step_makes_no_copy_of_what_the_codes_stand_for(name):
    """What is decoded is some blocks at a time: far less than all keys and values."""
    rows = np.random.default_rng(1).normal(size=(16 * 16, 4)).astype(np.float32).tobytes()
    codec = CQ(4, 4, Codebooks(rows, rows, 4, "")) if name == "cq" else CODECS[name]
    tier, spec = sj.kv.Full(16384, codec=codec), sj.kv.KVSpec(1, 1, 64, jnp.dtype(jnp.float32))
    state = jax.eval_shape(lambda: tier.init(spec))
    q, one = jax.ShapeDtypeStruct((1, 1, 1, 64), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    query = sj.kv.Query(q, q, jax.ShapeDtypeStruct((1, 1), jnp.uint32), one, None, None, 0.1, None)
    compiled = jax.jit(lambda state, query: tier.attend(state, query, None)).lower(state, query).compile()
    whole = 2 * 16384 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2  # not of the keys alone either
