"""Meshes, the logical-axis table, and the placement of trees."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

import streamjax as sj
from streamjax.parallel.mesh import build_sharded, make_mesh, row_share, row_shares, shard_model, shardings
from streamjax.parallel.rules import RULES, partition_spec
from tests.parallel.small_models import BATCH, CACHES, CONFIG, MESHES, small_model


def test_axes_and_the_devices_that_are_left():
    mesh = make_mesh(data=2, tensor=-1)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "context": 1, "tensor": 4}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert make_mesh(tensor=2, devices=jax.devices()[3:5]).devices.size == 2


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "data 3 does not fit 8 devices"),
        ({}, "one device does not fit 8 devices"),
        ({"data": 2, "fsdp": 8}, "data 2 x fsdp 8 does not fit 8 devices"),
        ({"data": 3, "tensor": -1}, "data 3 does not fit 8 devices"),
        ({"data": 16, "tensor": -1}, "data 16 does not fit 8 devices"),
        ({"data": -1, "tensor": -1}, "only one can take"),
        ({"data": 8, "tensor": 0}, "mesh axis tensor is 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(axes, message):
    with pytest.raises(ValueError, match=message) as error:
        make_mesh(**axes)
    assert "\n" not in str(error.value)


@given(
    names=st.lists(st.sampled_from([*RULES, None]), max_size=4),
    sizes=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), min_size=4, max_size=4),
    shape=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 4),
)
def test_a_spec_uses_a_mesh_axis_once_and_divides(names, sizes, shape):
    mesh = AbstractMesh(shape, ("data", "fsdp", "context", "tensor"))
    sizes = sizes[: len(names)]
    spec = [(entry,) if isinstance(entry, str) else entry or () for entry in partition_spec(names, sizes, mesh)]
    used = [axis for entry in spec for axis in entry]
    assert len(used) == len(set(used))
    for name, size, entry in zip(names, sizes, spec, strict=True):
        assert set(entry) <= set(RULES[name] if name else ())
        assert size % math.prod(mesh.shape[axis] for axis in entry) == 0


def test_names_of_a_stack_and_unknown_names():
    mesh = AbstractMesh((2, 4), ("data", "tensor"))
    assert partition_spec(("embed", "mlp"), (3, 5, 8), mesh) == PartitionSpec(None, None, ("tensor",))
    assert partition_spec(("batch", "heads"), (3, 6), mesh) == PartitionSpec(None, None)
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        partition_spec(("head",), (4,), mesh)


def _shard(array):
    return array.sharding.shard_shape(array.shape)


def test_parameters_are_split_by_their_names():
    mesh = make_mesh(**MESHES["data2-fsdp2-tensor2"])
    model = shard_model(small_model(), mesh)
    block = model.layers[0]
    assert _shard(model.embedding[...]) == (40, 20)
    assert _shard(model.head[...]) == (20, 40)
    assert _shard(block.mixer.projections.qkv[...]) == (20, 2, 4, 6)
    assert _shard(block.mixer.projections.qkv_bias[...]) == (2, 4, 6)
    assert _shard(block.mixer.projections.out[...]) == (2, 2, 6, 20)
    assert _shard(block.mlp.up[...]) == (20, 2, 28)
    assert _shard(block.mlp.down[...]) == (28, 20)
    assert _shard(model.norm.weight[...]) == (40,)
    stacked = shard_model(small_model(scan_layers=True), mesh)
    assert _shard(stacked.stack[0].mlp.up[...]) == (2, 20, 2, 28)
    # what splits lies on four devices' worth of shards; norms and biases are few
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model))
    assert on_one < 0.3 * sum(x.nbytes for x in jax.tree.leaves(model))


def test_optimizer_state_lies_where_its_parameters_lie():
    mesh = make_mesh(**MESHES["data2-fsdp2-tensor2"])
    optimizer = optax.adam(1e-3)
    state = build_sharded(lambda key: optimizer.init(sj.Decoder(CONFIG, key)), mesh, jax.random.key(0))
    assert _shard(state[0].mu.layers[1].mlp.up[...]) == (20, 2, 28)
    assert _shard(state[0].nu.embedding[...]) == (40, 20)
    assert state[0].count.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("cache", "mesh", "shard"),
    [
        ("streaming_llm", "data2-fsdp2-tensor2", (2, 2)),
        ("cascade", "data2-tensor4", (4, 1)),
        ("dense", "data2-tensor4", (4, 1)),
        ("window", "fsdp8", (1, 4)),
    ],
)
def test_a_stream_is_made_in_its_place(cache, mesh, shard):
    mesh, model = make_mesh(**MESHES[mesh]), small_model()
    with jax.set_mesh(mesh):
        state = sj.init_state(model, CACHES[cache], BATCH)
    for tier in state.layers[0]:
        assert _shard(tier.k)[:2] == _shard(tier.v)[:2] == shard
        assert _shard(tier.k)[2:] == tier.k.shape[2:]
        assert _shard(tier.position)[0] == shard[0]
    assert _shard(state.seen) == _shard(state.position) == (shard[0],)
    assert _shard(state.hidden) == (shard[0], 40)
    abstract = jax.eval_shape(lambda: sj.init_state(model, CACHES[cache], BATCH))
    planned = jax.tree.leaves(shardings(abstract, mesh))
    for array, sharding in zip(jax.tree.leaves(state), planned, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_heads_that_do_not_divide_are_repeated():
    mesh = make_mesh(tensor=8)
    with jax.set_mesh(mesh):
        state = sj.init_state(small_model(), CACHES["window"], 1)
    assert _shard(state.layers[0][0].k) == (1, 4, 12, 6)


def test_what_was_compiled_without_a_mesh_compiles_again_under_one():
    model, tokens = small_model(), jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    alone = sj.forward(model, tokens)
    assert len(alone.sharding.device_set) == 1
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        split = sj.forward(model, tokens)
    assert _shard(split) == (1, 8, 20)
    again = sj.forward(model, tokens)
    assert len(again.sharding.device_set) == 1
    assert (again == alone).all()


def by_halves(device):
    """Of two devices each, four processes."""
    return device.id // 2


@pytest.mark.parametrize(
    ("axes", "shares"),
    [
        ({"data": 8}, [0, 1, 2, 3]),
        ({"fsdp": 4, "tensor": 2}, [0, 1, 2, 3]),
        ({"data": 2, "tensor": 4}, [0, 0, 1, 1]),
        ({"data": 2, "context": 2, "tensor": 2}, [0, 0, 1, 1]),
        ({"replica": 2, "context": 4}, [0, 0, 1, 1]),
        ({"tensor": 8}, [0, 0, 0, 0]),
        ({"tensor": 4, "expert": 2}, [0, 0, 0, 0]),  # each process has both parts
        ({"stage": 2, "data": 4}, [0, 1, 0, 1]),
    ],
)
def test_processes_that_differ_along_other_axes_have_the_same_rows(axes, shares):
    found = row_shares(make_mesh(**axes), by_halves)
    assert [found[process].part for process in range(4)] == shares
    assert {share.parts for share in found.values()} == {len(set(shares))}
    assert row_share(make_mesh(**axes)) == row_share(None) == (0, 1)


def test_shares_of_rows_that_overlap_are_refused():
    """A process of three devices, and one of five."""
    with pytest.raises(
        ValueError, match=r"^the devices of 2 processes lie across this mesh .* overlap or differ in size"
    ):
        row_shares(make_mesh(data=8), lambda device: int(device.id > 2))
    with pytest.raises(ValueError, match="overlap"):
        row_shares(make_mesh(data=4, tensor=2), lambda device: (device.id + 1) // 2 % 4)
