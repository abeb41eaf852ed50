from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from pallas_kernels.coded import float8
from streamjax.kv.codecs.codec import bytes_per_token
from streamjax.kv.codecs.packing import packed, plane_of, with_plane
from streamjax.kv.codecs.stores import stores
from tests.oracles.codecs import block_floats, by_channel, by_token, coupled, fireq, gear, mixed

Int, FP8, BlockFloats, FireQ, Mixed = sj.kv.Int, sj.kv.FP8, sj.kv.BlockFloats, sj.kv.FireQ, sj.kv.Mixed
CQ, Codebooks = sj.kv.CQ, sj.kv.Codebooks


@partial(jax.jit, static_argnums=(0, 2))
def _coded(codec, x, role):
    return codec.decode(codec.encode(x, role), role)


def coded(codec, x, role):
    """A group of tokens [G, D] as they come back."""
    return np.asarray(_coded(codec, jnp.asarray(x)[None, None, None], role))[0, 0, 0]


@pytest.mark.parametrize(("bits", "fit"), [(8, "range"), (4, "error"), (2, "error"), (1, "range")])
@pytest.mark.parametrize("role", ["k", "v"])
def test_codes_come_back_as_a_plain_loop_says(bits, fit, role):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(8, 16)).astype(np.float32) * rng.uniform(0.01, 30, 16).astype(np.float32) + 3
    x[:, 3], x[2] = 0.7, -1.3  # a channel that never changes, and a token
    codec = Int(bits=bits, group=8, fit=fit)
    np.testing.assert_array_equal(
        coded(codec, x, role), by_channel(x, bits, fit) if role == "k" else by_token(x, bits, 8, fit)
    )


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize(("rank", "outliers"), [(2, 1), (0, 2), (3, 0)])
def test_gear_keeps_what_codes_miss(role, rank, outliers):
    x = np.random.default_rng(rank).normal(size=(32, 16)).astype(np.float32) * np.linspace(0.5, 3, 16, dtype=np.float32)
    codec = sj.kv.Gear(2, group=32, rank=rank, outliers=outliers)
    found = coded(codec, x, role)
    expected, apart = gear(x, 2, rank, outliers, role == "k")
    assert (np.abs(found - x)[apart] <= np.abs(x)[apart] / 128).all()  # as bfloat16 has them
    assert np.linalg.norm(found - x) < 1.03 * np.linalg.norm(expected - x)
    assert np.linalg.norm(found - x) < 0.95 * np.linalg.norm(coded(codec.base, x, role) - x)


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize(
    ("codec", "plain", "most"),
    [
        (BlockFloats(4, block=4, group=8), lambda x, keys: block_floats(x, 4, 4, True), 0),
        (BlockFloats(8, block=8, group=8, sort=False), lambda x, keys: block_floats(x, 8, 8, False), 0),
        # scales and steps are bfloat16, and a number may take the code beside its own
        (FireQ(8, group=8, top=2), lambda x, keys: fireq(x, 8, 2, keys), 0.02),
        (FireQ(4, group=8, top=0), lambda x, keys: fireq(x, 4, 0, keys), 0.15),
        (Mixed(8, wide=0.5), lambda x, keys: mixed(x, 8, keys, True), 0.02),
        (Mixed(8, wide=0.25, transform=False), lambda x, keys: mixed(x, 4, keys, False), 0.01),
    ],
)
def test_published_codes_come_back_as_plain_loops_say(codec, plain, most, role):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(8, 16)).astype(np.float32) * rng.uniform(0.1, 8, 16).astype(np.float32)
    x[:, 3], x[2] = 0.0, x[2] * 5
    found = coded(codec, x, role)
    expected = plain(x, role == "k")
    assert np.abs(found - expected).max() <= most * np.abs(x).max()
    assert 0 < np.linalg.norm(found - x) < (0.2 if codec.bits == 4 else 0.8) * np.linalg.norm(x)


def test_coupled_channels_are_the_nearest_entries_however_many_tokens_come_at_a_time():
    rng = np.random.default_rng(4)
    books = {role: rng.normal(size=(2 * 4, 16, 4)).astype(np.float32) * scale for role, scale in (("k", 3), ("v", 0.2))}
    own = Codebooks(books["k"].tobytes(), books["v"].tobytes(), 4, "a model")
    codec = CQ(4, 4, own)
    encode = jax.jit(lambda codec, x, role, tables: codec.encode(x, role, *tables), static_argnums=(0, 2))
    decode = jax.jit(lambda codec, codes, role, tables: codec.decode(codes, role, *tables), static_argnums=(0, 2))
    for role in "kv":
        tables = [jnp.asarray(table)[None] for table in codec.tables(role, 2, 16)]
        x = (rng.normal(size=(1, 2, 1, 300, 16)) * (3 if role == "k" else 0.2)).astype(np.float32)
        codes = encode(codec, x, role, tables)
        few = encode(codec, x[:, :, :, 290:], role, tables)
        np.testing.assert_array_equal(codes[0][:, :, :, 290:], few[0])
        found = np.asarray(decode(codec.without_numbers(), codes, role, tables))[0, :, 0, :40]
        for head in range(2):
            expected = coupled(x[0, head, 0, :40], books[role].reshape(2, 4, 16, 4)[head])
            # an entry lies on a grid of 511 steps, and of two that are as near either is taken
            off = np.abs(found[head] - expected).reshape(40, 4, 4).max(axis=2) > np.abs(books[role]).max() / 511
            assert off.mean() < 0.03
            near = np.linalg.norm(found[head] - x[0, head, 0, :40]) / np.linalg.norm(expected - x[0, head, 0, :40])
            assert near < 1.01


@pytest.mark.parametrize("role", ["k", "v"])
def test_transformed_channels_come_back_as_a_plain_loop_says(role):
    """Of 12 channels four at a time: half of +1 where two places share an even number of bits, of -1 elsewhere."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, 12)).astype(np.float32)
    matrix = np.array([[(-1) ** (i & j).bit_count() / 2 for j in range(4)] for i in range(4)], np.float32)
    parts = by_token((x.reshape(8, 3, 4) @ matrix).reshape(8, 12), 4, 12, "error")
    expected = (parts.reshape(8, 3, 4) @ matrix).reshape(8, 12)
    codec, plain = sj.kv.Hadamard(Int(4, fit="error")), Int(4, fit="error").one_by_one()
    np.testing.assert_allclose(coded(codec, x, role), expected, rtol=0, atol=2e-6 * np.abs(x).max())
    wide = rng.normal(size=(8, 64)).astype(np.float32)
    wide[:, ::16] *= 6  # channels that are large in every token
    less, more = (np.linalg.norm(coded(each, wide, role) - wide) for each in (codec, plain))
    assert less < 0.6 * more


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([8, 4, 2]), st.floats(1e-3, 1e4), st.floats(-1e4, 1e4))
def test_no_number_moves_by_more_than_half_a_step(seed, bits, spread, middle):
    x = (np.random.default_rng(seed).normal(size=(1, 1, 1, 8, 16)) * spread + middle).astype(np.float32)
    codec = Int(bits=bits, group=8)
    codes, numbers = codec.encode(jnp.asarray(x), "k")
    step = numbers[1].astype(jnp.float32)
    assert (jnp.abs(codec.decode((codes, numbers), "k") - x) <= step * 0.5001 + 1e-6 * np.abs(x).max()).all()


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", jnp.float8_e4m3fn), ("e5m2", jnp.float8_e5m2)])
def test_floats_of_eight_bits_are_widened_exactly(kind, dtype):
    bits = jnp.arange(256, dtype=jnp.uint8)
    expected = np.asarray(jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32))
    np.testing.assert_array_equal(float8(bits, kind), np.where(np.isinf(expected), np.nan, expected))


def test_codes_share_bytes():
    codes = jnp.arange(32, dtype=jnp.uint8).reshape(1, 8, 4) % 4
    whole = packed(codes, 2)
    assert whole.shape == (1, 2, 4)
    for plane in range(4):
        np.testing.assert_array_equal(plane_of(whole, 2, plane), codes[:, 2 * plane : 2 * plane + 2])
    other = with_plane(whole, jnp.full((1, 2, 4), 3, jnp.uint8), 2, 1)
    assert (plane_of(other, 2, 1) == 3).all()
    np.testing.assert_array_equal(plane_of(other, 2, 2), plane_of(whole, 2, 2))


@pytest.mark.parametrize(
    ("codec", "channels", "a_token"),
    [
        (Int(8), 64, 2 * 64 + 8),
        (Int(4), 64, 64 + 8),
        (Int(2, group=32), 64, 32 + 8 + 8),
        (FP8(), 64, 128),
        (sj.kv.Hadamard(Int(4)), 64, 64 + 8),
        (BlockFloats(4, block=16, group=64), 64, 2 * (32 + 4 + 1)),
        (FireQ(4, group=64), 64, 2 * (32 + 2) + 2),
        (Mixed(32, wide=0.5), 64, 8 + 4 + (32 * 6 + 64) / 32 + 13 + 4),
        (sj.kv.Gear(2, group=64, rank=2, outliers=1), 64, 32 + 8 + 2 * 3 + 2 * (4 + 4)),
    ],
)
def test_bytes_a_token_are_those_of_the_arrays(codec, channels, a_token):
    assert bytes_per_token(codec, channels) == a_token
    k, v = stores(
        jnp.zeros((1, 1, 1024, channels), jnp.bfloat16), jnp.zeros((1, 1, 1024, channels), jnp.bfloat16), codec
    )
    assert sum(x.nbytes for y in (k, v) for x in jax.tree.leaves((y.codes, y.numbers))) == 1024 * a_token


def test_int4_with_groups_of_64_is_less_than_0_3_of_bfloat16():
    assert bytes_per_token(Int(4, group=64), 64) <= 0.30 * 4 * 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(bits=3), r"Int\.bits is 3: it must be 8 or 4 or 2 or 1"),
        (lambda: sj.kv.Gear(group=8, rank=9), r"Gear\.rank is 9, but a group has 8 tokens"),
        (lambda: BlockFloats(group=7), r"BlockFloats\.group is 7, the residual 0: the group is a multiple of 2"),
        (lambda: FireQ(top=99), r"FireQ\.top is 99: it must be a whole number from 0 to 32"),
        (lambda: sj.kv.Gear(outliers=99), r"Gear\.outliers is 99: it must be a whole number from 0 to 32"),
        (
            lambda: sj.kv.preset("fireq", top=99),
            r"cache preset 'fireq': top is 99: it must be a whole number from 0 to",
        ),
        (lambda: FireQ(bits=1), r"FireQ\.bits is 1: codes around 0 have 2 bits at least"),
        (lambda: Mixed(wide=1.5), r"Mixed\.wide is 1\.5: it must be a number from 0 to 1"),
        (lambda: CQ(coupled=9), r"CQ\.coupled is 9: at most 8 channels share a code"),
        (
            lambda: sj.kv.Scored(8, sj.kv.KNorm(), codec=CQ()),
            r"Scored\.codec: CQ.* codes unrotated keys, which Full and",
        ),
        (lambda: sj.kv.Pages(8, 64, 1, codec=CQ()), r"Pages\.codec: CQ.* codes unrotated keys, which Full and Window"),
        (lambda: sj.kv.preset("cq"), r"cache 'cq' needs codebooks=FILE: sj\.measure_codebooks\(model, ids\)"),
        (lambda: Int(group=64, residual=100), r"Int\.residual must be a multiple of the group of 64, got 100"),
        (lambda: Int(bits=4, group=7), r"Int\.group of 7 tokens does not fill bytes with codes of 4 bits"),
        (lambda: Int(keys="row"), r"Int\.keys is 'row': it must be 'channel' or 'token'"),
        (lambda: FP8(kind="e3m4"), r"FP8\.kind is 'e3m4'"),
        (lambda: sj.kv.Window(63, codec=Int(4)), r"Window\.size is 63, but Int.* codes no token before there are 64"),
        (lambda: sj.kv.Full(8, codec=4), r"Full\.codec is 4: it must be Codec or None"),
        (lambda: sj.kv.Pages(32, 64, 1, codec=Int(4)), r"Pages\(size=32\) holds whole groups of a codec"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_descriptions_from_before_codecs_still_fit():
    from streamjax.field_checks import described

    old = "Cascade(tiers=(Window(size=7, observe_attention=False, keep_ids=False), Full(capacity=9)))"
    assert described(sj.kv.Cascade(sj.kv.Window(7), sj.kv.Full(9))) == old
    assert "codec=Int(bits=4" in described(sj.kv.Cascade(sj.kv.Full(64, codec=Int(4))))
