"""What devices hold as bytes, and back: every dtype and shape, on one device and over a mesh, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from streamjax.snapshots.shards import from_bytes, sealed, to_parts

ABOUT = {"data": {"place": 3}, "metrics": [0.1, "bfloat16"]}


def tree_of(place):
    """Arrays of many kinds, at the shardings that `place` gives for their dimensions."""
    values = {
        "matrix": np.arange(64, dtype=np.float32).reshape(8, 8) / 3,
        "half": np.arange(32).reshape(8, 4).astype(jnp.bfloat16),
        "flags": np.arange(16) % 3 == 0,
        "step": np.int32(7),
        "key": np.asarray([1, 2**32 - 1], np.uint32),
        "codes": np.arange(-8, 8).astype(jnp.int4),
        "nothing": np.zeros((0, 8), np.float32),
        "nan": np.asarray([np.nan, -0.0, np.inf], np.float32),
    }
    return {
        "a": [jax.device_put(x, place(np.ndim(x))) for x in values.values()],
        "last": jax.device_put(values["nothing"], place(2)),
    }


def places(devices):
    """Of arrays of so many dimensions."""
    if devices == 1:
        return lambda dimensions: jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.make_mesh((2, devices // 2), ("x", "y"))
    specs = {0: PartitionSpec(), 1: PartitionSpec(), 2: PartitionSpec("x")}
    return lambda dimensions: NamedSharding(mesh, specs[dimensions])


def raw(tree):
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("devices", [1, 8])
def test_bits_shapes_and_places_come_back(devices):
    if len(jax.devices()) < devices:
        pytest.skip("too few devices")
    tree = tree_of(places(devices))
    data = bytearray(b"".join(bytes(part) for part in sealed(to_parts(tree, ABOUT))))
    template = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)
    found, about = from_bytes(data, template)
    assert about == ABOUT
    assert raw(found) == raw(tree)
    assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(tree)]
    # Shards that several devices share are there once.
    assert len(data) < 2 * sum(x.nbytes for x in jax.tree.leaves(tree)) + 4000
    data[:] = bytes(len(data))  # what was restored is no view of the bytes
    assert raw(found) == raw(tree)


def test_other_arrays_or_devices_are_refused():
    tree = {"a": jnp.arange(8.0)}
    data = bytearray(b"".join(bytes(part) for part in sealed(to_parts(tree, {}))))
    for other in ({"b": jnp.arange(8.0)}, {"a": jnp.arange(4.0)}, {"a": jnp.arange(8)}):
        with pytest.raises(ValueError, match="on other devices"):
            from_bytes(data, other)
    data[-20] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        from_bytes(data, tree)
