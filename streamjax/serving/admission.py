"""What cannot be served is refused before anything runs, in one line."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax

from streamjax.serving.requests import Request
from streamjax.serving.row_sampling import MOST_ALTERNATIVES


def require_possible(request: Request, vocab_size: int, adapters: Collection[str] = ()) -> None:
    """Raise a ValueError for a request that no engine with this vocabulary and these adapters can serve."""
    ids = {
        "prompt": request.prompt,
        "stop_ids": request.stop_ids,
        "logit_bias": [token for token, _ in request.sampling.logit_bias],
    }
    for name, tokens in ids.items():
        wrong = next((token for token in tokens if type(token) is not int or not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name} has {wrong!r}, which is no id of the model's vocabulary of {vocab_size}")
    if not request.prompt and request.conversation is None:
        raise ValueError("the prompt is empty: it needs at least one token, such as BOS")
    if request.shared < 0:
        raise ValueError(f"shared must not be negative, got {request.shared}")
    if request.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {request.max_new_tokens}")
    if not all(isinstance(word, str) and word for word in request.stop):
        raise ValueError("stop must be strings that are not empty")
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_ALTERNATIVES:
        raise ValueError(f"logprobs must be in [0, {MOST_ALTERNATIVES}], got {request.logprobs}")
    if request.adapter is not None and request.adapter not in adapters:
        there = f"there are {', '.join(sorted(adapters))}" if adapters else "this engine serves the model alone"
        raise ValueError(f"unknown adapter {request.adapter!r}: {there}")


def require_room_for(request: Request, used: int, capacity: int | None) -> None:
    """Raise a ValueError where a request does not fit behind the `used` tokens of its stream."""
    if not used and not request.prompt:
        raise ValueError(f"conversation {request.conversation!r} has not begun: its first prompt must not be empty")
    more = len(request.prompt) + request.max_new_tokens
    if capacity is not None and used + more > capacity:
        raise ValueError(
            f"the cache holds {capacity} tokens: {used} are used and {more} more do not fit; ask for fewer tokens"
        )


def require_memory(
    rows: int, row: int, pool: int, prefix_bytes: int, conversation_bytes: int, memory_bytes: int | None
) -> None:
    """Raise a ValueError where the states of an engine would take more than `memory_bytes`; nothing is allocated.

    Args:
      rows: streams at a time, beside which one is read.
      row, pool: bytes of a stream by itself, and of the pages that all share.
      prefix_bytes, conversation_bytes, memory_bytes: of the engine.
    """
    for name, value in (("prefix_bytes", prefix_bytes), ("conversation_bytes", conversation_bytes)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    fixed = prefix_bytes + conversation_bytes + pool + row
    if memory_bytes is None or rows * row + fixed <= memory_bytes:
        return
    pages = f" and {pool:,} of pages" if pool else ""
    fit = max((memory_bytes - fixed) // row, 0)
    raise ValueError(
        f"{rows} rows of {row:,} bytes{pages}, {prefix_bytes:,} for prefixes and {conversation_bytes:,} for "
        f"conversations are more than memory_bytes={memory_bytes:,}: {fit} rows would fit"
        + ("; pool_tokens sets how many pages there are" if pool else "")
    )


def nbytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
