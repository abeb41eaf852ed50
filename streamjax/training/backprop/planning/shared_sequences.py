"""Which models the orders that cut sequences train where the mesh axis `context` shares these, and how."""

from __future__ import annotations

from streamjax.models.config import ModelConfig, UniformConfig, expanded
from streamjax.training.backprop.gradient_reduction import Shared

NOTHING_KEPT = 'keep_attention is not for "layer" where devices along context share sequences: set it to False'


def how_shared(config: ModelConfig | UniformConfig, stacked: bool, method: str, devices: int) -> Shared | None:
    """What each of the devices along `context` has with "layer" or "chunk"; None: it is left to the compiler."""
    if devices == 1 or why_not_shared(config, stacked, method, devices):
        return None
    return "stretches" if method == "layer" else "stages"


def why_not_shared(config: ModelConfig | UniformConfig, stacked: bool, method: str, devices: int) -> str | None:
    """Why "layer" or "chunk" does not train a model on sequences over so many devices, and what does; None: it does.

    stacked: whether repeating layers are stacked (`scan_layers`).
    """
    config, say = expanded(config), f"backprop.method {method!r} with mesh.context {devices}"
    if method == "layer":
        return None
    if config.hsa is not None:
        return f'{say} is not for models with a chunk memory: use "layer"'
    if not stacked or config.repeats * config.period != config.num_layers:
        return f'{say} deals layers out to devices and needs stacked ones: set scan_layers=True, or use "layer"'
    if config.repeats % devices:
        return (
            f"{say} deals out the {config.repeats} repeats of the model's {config.period} layers: use a number of "
            'devices that divides them, or "layer"'
        )
    return None


def even_chunk(length: int, most: int, devices: int) -> int:
    """The size of chunks, at most `most`, which make up each device's stretch of `length` tokens without padding.

    Example:
      >>> even_chunk(6144, 500, 2)  # stretches of 3,072 tokens, and 384 divides them
      384

    Raises:
      ValueError: only chunks of less than an eighth of `most` would.
    """
    stretch = length // devices
    size = _largest_divisor(stretch, most)
    if not divides(stretch, most):
        raise ValueError(
            f"a stretch of {stretch} tokens ({length} over {devices} devices along context) is cut by no chunk_size "
            f"from {size + 1} to {min(most, stretch)}: choose a length with more divisors"
        )
    return size


def divides(stretch: int, most: int) -> bool:
    """Whether chunks of at most `most` tokens, and of not much less, make up a stretch."""
    return 8 * _largest_divisor(stretch, most) >= min(most, stretch)


def _largest_divisor(stretch: int, most: int) -> int:
    return next(size for size in range(min(most, stretch), 0, -1) if stretch % size == 0)
