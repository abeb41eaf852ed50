"""`method="auto"`: the fastest order of backprop that the memory allows, by the memory model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from streamjax.models.config import ModelConfig, UniformConfig, expanded
from streamjax.training.backprop.planning.layer_bytes import found_numbers
from streamjax.training.backprop.planning.memory_model import DEFAULT_CHUNK, Memory, estimate
from streamjax.training.backprop.planning.shared_sequences import dealt_by_mesh, divides

HEADROOM = 0.9  # share of the memory that an estimate may fill; most are right within 10%
UNSTACKED_HEADROOM = (
    0.4  # the same for layers that are not stacked, of which a CPU's compiler makes up to 2.2 times as much
)

_IN_WORDS = ("method", "offload", "keep_attention")
WHOLE_METHODS = ("full", "remat")  # that do not cut the sequence


class Choice(NamedTuple):
    """Arguments of `loss_and_grad`, and what they need by the memory model."""

    arguments: Mapping[str, Any]
    memory: Memory

    def describe(self, memory_bytes: int) -> str:
        """One line for a log."""
        words = [str(self.arguments["method"])]
        words += [f"{name} {x:g}" for name, x in self.arguments.items() if name not in _IN_WORDS]
        words += ["attention kept"] if self.arguments.get("keep_attention") else []
        words.append(f"estimated {_gigabytes(self.memory.device_bytes)} of {_gigabytes(memory_bytes)} GB")
        if self.memory.host_bytes:
            words.append(f"{_gigabytes(self.memory.host_bytes)} GB in the host's memory")
        return ", ".join(words)


def choose(
    config: ModelConfig | UniformConfig,
    *,
    batch_size: int,
    length: int,
    memory_bytes: int,
    chunk_size: int | None = None,
    platform: str = "tpu",
    stacked: bool = True,
    **known: Any,
) -> Choice:
    """The fastest way to take the gradient of a batch that fits in the memory.

    From fast to slow: "full", "remat" and "layer", each of the two first with what attention found kept, "chunk",
    "layer" with the smallest segment that fits and, on devices with fast host memory (all but CPUs), "layer" with the
    smallest share of the layers' inputs moved there. An estimate may fill `HEADROOM` of the memory, and of layers that
    are not stacked `UNSTACKED_HEADROOM`.

    Args:
      config, batch_size, length, platform, stacked, known: as for `estimate`; rows and tokens on one device.
      memory_bytes: of one device, all that the step may use: parameters and gradients are part of it.
      chunk_size: tokens of a chunk where a method cuts the sequence; as in `loss_and_grad` where None.

    Raises:
      ValueError: nothing fits; the message has what comes closest.
    """
    found, fits = best_or_closest(
        config,
        batch_size=batch_size,
        length=length,
        memory_bytes=memory_bytes,
        chunk_size=chunk_size,
        platform=platform,
        stacked=stacked,
        **known,
    )
    if fits:
        return found
    advice = "" if stacked else ", or stack the layers (scan_layers=True)"
    raise ValueError(
        f"no backprop method fits {batch_size} x {length} tokens; closest: {found.describe(memory_bytes)}, of which "
        f"{HEADROOM if stacked else UNSTACKED_HEADROOM:.0%} may be filled: shorten the sequences{advice}"
    )


def best_or_closest(
    config: ModelConfig | UniformConfig,
    *,
    batch_size: int,
    length: int,
    memory_bytes: int,
    chunk_size: int | None,
    platform: str,
    stacked: bool,
    **known: Any,
) -> tuple[Choice, bool]:
    """What `choose` takes and True; where nothing fits, what needs the least memory and False."""
    config = expanded(config)
    size = min(chunk_size or DEFAULT_CHUNK, length)
    closest: Choice | None = None
    for arguments in _candidates(config, size, math.ceil(length / size), platform, stacked):
        if not _shares(config, arguments, length, stacked, known.get("context", 1)):
            continue
        memory = estimate(
            config, batch_size=batch_size, length=length, platform=platform, stacked=stacked, **arguments, **known
        )
        found = Choice(arguments, memory)
        if memory.device_bytes <= (HEADROOM if stacked else UNSTACKED_HEADROOM) * memory_bytes:
            return found, True
        if closest is None or memory.device_bytes < closest.memory.device_bytes:
            closest = found
    assert closest is not None
    return closest, False


def _shares(config: ModelConfig, arguments: Mapping[str, Any], length: int, stacked: bool, devices: int) -> bool:
    """Whether so many devices can share sequences, of which each has `length` tokens, with these arguments."""
    method = arguments["method"]
    if devices == 1 or method in WHOLE_METHODS:
        return True
    if arguments.get("keep_attention") or (method == "chunk" and not dealt_by_mesh(config, stacked, devices)):
        return False
    return divides(length, arguments["chunk_size"])


def _candidates(
    config: ModelConfig, chunk_size: int, chunks: int, platform: str, stacked: bool
) -> Iterator[dict[str, Any]]:
    """Arguments of `loss_and_grad`, the fastest first."""
    cpu_undoes = platform == "cpu" and not stacked  # its compiler finds that layers are computed twice, and keeps them
    attends = any(map(found_numbers, config.blocks))
    yield {"method": "full"}
    layer = {"method": "layer", "chunk_size": chunk_size}
    for method in (layer,) if cpu_undoes else ({"method": "remat"}, layer):
        if attends:
            yield {**method, "keep_attention": True}
        yield method
    yield {"method": "chunk", "chunk_size": chunk_size}
    period = config.period if stacked else 1  # a segment is a number of periods
    if not cpu_undoes:
        for segment in range(max(2, period), config.num_layers // period * period + 1, period if period > 1 else 1):
            yield {**layer, "segment": segment}
    if platform != "cpu":
        for moved in range(1, chunks + 1):
            yield {**layer, "offload": "host", "offload_fraction": moved / chunks}


def device_memory_bytes() -> int:
    """Bytes that programs may use of one device of this process; of a CPU's machine, what is free of its memory now.

    Raises:
      ValueError: the backend does not tell.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    if device.platform == "cpu":
        return available_host_bytes()
    raise ValueError(f"a {device.platform} device does not tell how much memory it has: give memory_bytes")


def available_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the machine can give a program without swapping: Linux tells, of others it is all of their memory."""
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g}"
