"""Models and streams on many devices: meshes, and one table from logical axes to mesh axes."""

from streamjax.parallel.mesh import build_sharded, make_mesh, shard_model, shardings, with_placement
from streamjax.parallel.rules import RULES, constrain, partition_spec

__all__ = [
    "RULES",
    "build_sharded",
    "constrain",
    "make_mesh",
    "partition_spec",
    "shard_model",
    "shardings",
    "with_placement",
]
