"""Which models the orders that cut sequences train where the mesh axis `context` shares these, and how."""

from __future__ import annotations

from streamjax.models.config import ModelConfig, UniformConfig, expanded
from streamjax.training.backprop.gradient_reduction import Shared


def how_shared(config: ModelConfig | UniformConfig, stacked: bool, method: str, devices: int) -> Shared | None:
    """What each of the devices along `context` has with "layer" or "chunk"; None: there is but one.

    stacked: whether repeating layers are stacked (`scan_layers`).
    """
    if devices == 1:
        return None
    if method == "layer":
        return "stretches"
    return "stages" if dealt_by_mesh(config, stacked, devices) else "branches"


def dealt_by_mesh(config: ModelConfig | UniformConfig, stacked: bool, devices: int) -> bool:
    """Whether the layers are stacked and so many devices divide them evenly, by whole periods."""
    config = expanded(config)
    return stacked and config.repeats * config.period == config.num_layers and config.repeats % devices == 0


def shared_chunk(config: ModelConfig | UniformConfig | None, method: str, length: int, most: int, devices: int) -> int:
    """`even_chunk` for a model, with "layer" or "chunk"; None: a model that is not known yet.

    Raises:
      ValueError: there is none, or "chunk" has no layer for each of the devices.
    """
    if config is None or method != "chunk":
        return even_chunk(length, most, devices)
    config = expanded(config)
    if config.num_layers < devices:
        raise ValueError(
            f"backprop.method 'chunk' with mesh.context {devices} deals layers out to devices, and the model has "
            f'{config.num_layers}: use at most {config.num_layers} devices, or "layer"'
        )
    return even_chunk(length, most, devices, 1 if config.hsa is None else config.hsa.chunk_size)


def even_chunk(length: int, most: int, devices: int, page: int = 1) -> int:
    """The size of chunks, at most `most`, which make up each device's stretch of `length` tokens without padding.

    Chunks hold whole pages of `page` tokens.

    Example:
      >>> even_chunk(6144, 500, 2)  # stretches of 3,072 tokens, and 384 divides them
      384

    Raises:
      ValueError: only chunks of less than an eighth of `most` would, or a stretch is no whole pages.
    """
    stretch = length // devices
    if stretch % page:
        raise ValueError(
            f"a stretch of {stretch} tokens ({length} over {devices} devices along context) holds no whole pages of "
            f'{page} tokens: choose a length that {devices * page} divides, or backprop.method "layer"'
        )
    most = max(most, page)
    size = page * _largest_divisor(stretch // page, most // page)
    if 8 * size < min(most, stretch):
        raise ValueError(
            f"a stretch of {stretch} tokens ({length} over {devices} devices along context) is cut by no chunk_size "
            f"from {size + 1} to {min(most, stretch)}: choose a length with more divisors"
        )
    return size


def divides(stretch: int, most: int) -> bool:
    """Whether chunks of at most `most` tokens, and of not much less, make up a stretch."""
    try:
        return even_chunk(stretch, most, 1) > 0
    except ValueError:
        return False


def _largest_divisor(stretch: int, most: int) -> int:
    return next(size for size in range(min(most, stretch), 0, -1) if stretch % size == 0)
