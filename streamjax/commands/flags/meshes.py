"""`--mesh` and `--cache_mesh`: the devices that a model is split over, and those that its cache lies on."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh

from streamjax.commands.flags.checks import refuse_empty
from streamjax.parallel.mesh import make_mesh

_AXES = ("data", "fsdp", "context", "tensor", "expert")


class Meshes(NamedTuple):
    """The model's devices, and the cache's; None where no flag asks for them: one device, and the model's."""

    model: Mesh | None
    cache: Mesh | None


def define_cache_mesh(values: flags.FlagValues) -> None:
    """The flag that puts the cache on devices of its own."""
    flags.DEFINE_string(
        "cache_mesh", None, "Devices of their own for the cache, such as tensor=4, which also compute attention to it: "
        "queries go there, and partial results come back. The model has the first devices, as many as --mesh says or "
        "else one, and the cache the next ones; -1 means all that are left. tensor splits heads. For "
        "--cache=dense and --cache=inst_infer. The model's devices by default.", flag_values=values,
    )  # fmt: skip
    refuse_empty(values, "cache_mesh")


def meshes_of(values: flags.FlagValues) -> Meshes:
    """What the flags of a command say, of those that it has."""
    model, cache = (values[name].value if name in values else None for name in ("mesh", "cache_mesh"))
    return parse_meshes(model, cache)


def parse_meshes(model: str | None, cache: str | None) -> Meshes:
    """The meshes that --mesh and --cache_mesh describe.

    One of both takes all devices. Of two, the model's has the first devices and the cache's the next ones.

    Args:
      model, cache: axes and sizes, such as "data=1,tensor=4".

    Raises:
      ValueError: an unknown axis, a size that is no number, or sizes that do not fit the devices.

    Example:
      >>> parse_meshes("tensor=2", "tensor=-1").cache.shape["tensor"]  # of eight devices
      6
    """
    if not cache:
        return Meshes(parse_mesh(model), None)
    devices = jax.devices()
    sizes, wanted = _sizes("--mesh", model or ""), _sizes("--cache_mesh", cache)
    near, far = _devices(sizes), _devices(wanted)
    if near is None and far is None:
        raise ValueError(f"--mesh={model} and --cache_mesh={cache} both take the devices that are left: number one")
    near = len(devices) - (far or 0) if near is None else near
    far = len(devices) - near if far is None else far
    if min(near, far) < 1 or near + far > len(devices):
        raise ValueError(
            f"--cache_mesh={cache}: the model takes {max(near, 1)} devices and the cache {max(far, 1)} others, but "
            f"there are {len(devices)}"
        )
    with_mesh = make_mesh(**sizes, devices=devices[:near]) if model else None  # type: ignore[arg-type]
    return Meshes(with_mesh, make_mesh(**wanted, devices=devices[near : near + far]))  # type: ignore[arg-type]


def parse_mesh(text: str | None) -> Mesh | None:
    """The mesh that `--mesh` describes, over all devices; None where there is no text.

    Raises:
      ValueError: an unknown axis, a size that is no number, or sizes that do not fit the devices.
    """
    return make_mesh(**_sizes("--mesh", text)) if text else None  # type: ignore[arg-type]  # every key is an axis


def _sizes(flag: str, text: str) -> dict[str, int]:
    """Axes and their sizes."""
    sizes: dict[str, int] = {}
    for item in text.split(",") if text else ():
        axis, _, size = item.partition("=")
        if axis not in _AXES:
            raise ValueError(f"{flag}={text}: no mesh axis {axis!r}; {_nearest(axis, _AXES)}")
        if axis in sizes or not re.fullmatch(r"-?\d+", size):
            raise ValueError(f"{flag}={text}: give {axis} once, with a number of devices, such as {axis}=4")
        sizes[axis] = int(size)
    return sizes


def _devices(sizes: dict[str, int]) -> int | None:
    """How many devices a mesh takes; None: those that are left."""
    return None if -1 in sizes.values() else math.prod(sizes.values())


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
