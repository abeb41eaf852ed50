"""`mesh="auto"`: of all ways to split a step over devices, the one that fits and takes the least time by the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from streamjax.models.config import ModelConfig, UniformConfig, expanded
from streamjax.training.backprop.planning.memory_model import Memory, estimate, split_evenly
from streamjax.training.backprop.planning.method_choice import (
    HEADROOM,
    UNSTACKED_HEADROOM,
    best_or_closest,
)
from streamjax.training.backprop.planning.shared_sequences import dealt_by_mesh
from streamjax.training.mesh_choice.chips import Chip
from streamjax.training.mesh_choice.step_costs import AXES, Work, step_seconds

_MOMENTS = 8  # bytes of AdamW's state a parameter
_WEIGHT = 4


class MeshChoice(NamedTuple):
    """A mesh, the arguments of `loss_and_grad` on it, and what a step takes by the models.

    axes: devices along data, fsdp, context and tensor. seconds: of a step, by what they go to. memory: of the gradient
    on one device. device_bytes: with the optimizer's state.
    """

    axes: Mapping[str, int]
    arguments: Mapping[str, Any]
    seconds: Mapping[str, float]
    memory: Memory
    device_bytes: int

    def describe(self) -> str:
        """One line for a log."""
        mesh = " ".join(f"{name}={size}" for name, size in self.axes.items() if size > 1) or "one device"
        longest = max(self.seconds, key=lambda name: self.seconds[name])
        return (
            f"{mesh}, {self.arguments['method']}, estimated {self.device_bytes / 1e9:.3g} GB a device and "
            f"{sum(self.seconds.values()):.3g} s a step, most for {longest}"
        )


def choose_mesh(
    config: ModelConfig | UniformConfig,
    devices: int,
    chip: Chip,
    *,
    rows: int,
    length: int,
    method: str = "auto",
    microbatches: int = 1,
    memory_bytes: int | None = None,
    stacked: bool = True,
    platform: str = "tpu",
    dtype: Any = "bfloat16",
    trained: float = 1.0,
    **known: Any,
) -> MeshChoice:
    """The fastest mesh, by `step_seconds`, among those on which a step fits.

        found = choose_mesh(config, 64, chip_of("TPU v5p"), rows=8, length=2**20)
        make_mesh(**found.axes)

    Every division of the devices among data, fsdp, context and tensor is tried that splits evenly what it splits: rows,
    tokens, channels of the model, and heads and channels of layers. Experts are split by tensor and fsdp only.

    Args:
      config: the model, in float32 with AdamW's moments.
      devices: how many there are.
      chip: each of them (`chip_of`).
      rows, length: of a step, all devices together.
      method: of `loss_and_grad`; "auto" takes the fastest that fits on each mesh.
      microbatches: into which the rows are dealt out.
      memory_bytes: of a device, all that the step may use; the chip's where None.
      stacked: whether repeating layers are stacked (`scan_layers`).
      platform, dtype, trained: as for `estimate`.
      known: other arguments of `estimate`, `chunk_size` for instance.

    Raises:
      ValueError: nothing fits, or no mesh splits the step evenly; one line with what comes closest.
    """
    config = expanded(config)
    work = Work.from_config(config, rows, length)
    limit = chip.memory_bytes if memory_bytes is None else memory_bytes
    if rows % microbatches:
        raise ValueError(f"{rows} rows cannot be dealt out to {microbatches} microbatches")
    best: MeshChoice | None = None
    closest: tuple[int, Mapping[str, int]] | None = None
    for axes in meshes(config, devices, rows // microbatches, length):
        if method == "chunk" and axes["context"] > 1 and not dealt_by_mesh(config, stacked, axes["context"]):
            continue
        shards = axes["fsdp"] * axes["tensor"]
        moments = int(trained * _MOMENTS * config.parameter_count / shards)
        if microbatches > 1:
            moments += int(trained * _WEIGHT * config.parameter_count / shards)
        found = _fitting(
            config,
            method,
            limit - moments,
            chip.host_bytes,
            batch_size=rows // microbatches // (axes["data"] * axes["fsdp"]),
            length=length // axes["context"],
            stacked=stacked,
            platform=platform,
            dtype=dtype,
            param_dtype="float32",
            shards=shards,
            tensor=axes["tensor"],
            context=axes["context"],
            trained=trained,
            **known,
        )
        arguments, memory, fits = found
        size = memory.device_bytes + moments
        if not fits:
            closest = min(closest or (size, axes), (size, axes), key=lambda pair: pair[0])
            continue
        seconds = step_seconds(
            work,
            axes,
            chip,
            rows=rows,
            length=length,
            method=arguments["method"],
            segment=arguments.get("segment", 1),
            keep_attention=arguments.get("keep_attention", False),
            microbatches=microbatches,
        )
        if best is None or sum(seconds.values()) < sum(best.seconds.values()):
            best = MeshChoice(axes, arguments, seconds, memory, size)
    if best is not None:
        return best
    if closest is None:
        raise ValueError(
            f'mesh "auto": {devices} devices cannot share {rows // microbatches} x {length} tokens evenly: make the '
            "rows of a microbatch or the sequence's length a multiple of more of them"
        )
    mesh = " ".join(f"{name}={size}" for name, size in closest[1].items() if size > 1) or "one device"
    raise ValueError(
        f'mesh "auto": {rows} x {length} tokens fit {devices} devices in no way; closest: {mesh}, estimated '
        f"{closest[0] / 1e9:.3g} GB of {limit / 1e9:.3g} GB, which may not all be filled: use more devices, shorter "
        "sequences or fewer rows"
    )


def _fitting(
    config: ModelConfig, method: str, memory_bytes: int, host_bytes: float, **known: Any
) -> tuple[Mapping[str, Any], Memory, bool]:
    """Arguments of `loss_and_grad`, what they need, and whether that is there."""
    if method == "auto":
        known = {"chunk_size": None, **known}
        found, fits = best_or_closest(config, memory_bytes=memory_bytes, **known)
        if found.memory.host_bytes <= host_bytes:
            return found.arguments, found.memory, fits
        method = "remat"  # does not fit, or it had been taken; for the message
    memory = estimate(config, method=method, **known)
    if memory.host_bytes > host_bytes:
        return {"method": method}, memory, False
    share = HEADROOM if known["stacked"] else UNSTACKED_HEADROOM
    return {"method": method}, memory, memory.device_bytes <= share * memory_bytes


def meshes(config: ModelConfig, devices: int, rows: int, length: int) -> Iterator[dict[str, int]]:
    """Every way to divide devices among the axes that splits a microbatch and the model evenly."""
    for fsdp, context, tensor in _thirds(devices):
        data = devices // (fsdp * context * tensor)
        even = rows % (data * fsdp) == 0 and length % (2 * context if context > 1 else 1) == 0
        if even and config.d_model % fsdp == 0 and split_evenly(config, tensor):
            yield dict(zip(AXES, (data, fsdp, context, tensor), strict=True))


def _thirds(devices: int) -> Iterator[tuple[int, int, int]]:
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for fsdp in divisors:
        for context in divisors:
            for tensor in divisors:
                if devices % (fsdp * context * tensor) == 0:
                    yield fsdp, context, tensor
