"""One text through one cache: what every token cost, and what it took to find out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from streamjax.evaluation.curve import log_bins
from streamjax.evaluation.memory import SlotMemory, resident_bytes
from streamjax.kv.cascade import Cascade
from streamjax.models.decoder import Decoder
from streamjax.streaming.scan import score
from streamjax.streaming.state import init_state


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a text: tokens, and what they cost on average."""

    tokens: int
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood a token."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nats_per_token))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """The same in bits a byte of text."""
        return self.nats_per_token / np.log(2.0) / bytes_per_token


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of a run.

    nats: of every token, as far as it got. memory: the cache's. ended: why it did not get to the text's end; "" if it
    did. seconds: in all. tokens_per_second: without compilation. resident_bytes: the process's, at the end.
    """

    name: str
    nats: Float[np.ndarray, " N"]
    memory: SlotMemory
    ended: str
    seconds: float
    tokens_per_second: float
    resident_bytes: int

    def part(self, start: int = 0, stop: int | None = None) -> Part:
        """Tokens [start, stop) of the text, as far as the run got."""
        values = self.nats[start:stop]
        return Part(len(values), float(values.mean(dtype=np.float64)) if len(values) else float("nan"))

    def to_json_dict(self, bytes_per_token: float) -> dict[str, Any]:
        """The run as plain data, its curve on a logarithmic axis."""
        whole = self.part()
        position, nats = log_bins(self.nats)
        return {
            "name": self.name,
            "tokens": whole.tokens,
            "ended": self.ended,
            "nats_per_token": whole.nats_per_token,
            "perplexity": whole.perplexity,
            "bits_per_byte": whole.bits_per_byte(bytes_per_token),
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "cache_bytes": self.memory.allocated,
            "cache_bytes_in_use": self.memory.in_use(whole.tokens),
            "resident_bytes": self.resident_bytes,
            "curve": [
                {"position": p, "nats_per_token": n, "cache_bytes_in_use": self.memory.in_use(round(p))}
                for p, n in zip(position.tolist(), nats.tolist(), strict=True)
            ],
        }


def run_trial(
    name: str,
    model: Decoder,
    cache: Cascade | Sequence[Cascade],
    tokens: Int[np.ndarray, " T"],
    *,
    chunk_size: int = 512,
    skip: int = 0,
    seconds: float | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Trial:
    """Stream a text through a cache until it ends, the cache is full, or time is up.

    Args:
      name: what to call the run.
      model: the model.
      cache: a cascade for all layers, or one a layer.
      tokens: ids of the text, BOS first where the model expects one.
      chunk_size: tokens a step.
      skip: tokens at the start that are no text, such as BOS: their cost does not count.
      seconds: stop after this long.
      progress: told after every chunk how many tokens there were, and what they cost on average.
    """
    state = init_state(model, cache)
    memory, capacity = SlotMemory.of(state), state.capacity
    total = len(tokens) if capacity is None else min(len(tokens), capacity)
    ended = "" if total == len(tokens) else f"full at {capacity:,} tokens"
    pieces: list[np.ndarray] = []
    times = [time.perf_counter()]
    running = 0.0
    for start in range(0, total, chunk_size):
        piece = np.asarray(tokens[start : min(start + chunk_size, total)], np.int32)
        state, nats = score(model, state, piece[None], chunk_size)
        pieces.append(np.asarray(nats[0]))
        times.append(time.perf_counter())
        if not start:
            pieces[0] = pieces[0][skip:]
        running += float(pieces[-1].sum(dtype=np.float64))
        done = start + len(piece)
        if progress is not None:
            progress(done, running / max(done - skip, 1))
        if seconds is not None and times[-1] - times[0] > seconds and done < total:
            ended = f"out of time after {done:,} tokens"
            break
    jax.block_until_ready(state)
    lasted = np.diff(times)[:-1] if len(times) > 2 else np.diff(times)  # the end may be ragged, and compiles anew
    return Trial(
        name=name,
        nats=np.concatenate([np.zeros(0, np.float32), *pieces]),
        memory=memory,
        ended=ended,
        seconds=times[-1] - times[0],
        tokens_per_second=min(chunk_size, total) / float(np.median(lasted)) if len(lasted) else 0.0,
        resident_bytes=resident_bytes(),
    )
