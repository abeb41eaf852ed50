"""One text through one cache: what every token cost, and what it took to find out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from streamjax.evaluation.curves import log_bins
from streamjax.evaluation.memory import SlotMemory, resident_bytes
from streamjax.streaming.session import Session


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
    session: Session,
    tokens: Int[np.ndarray, " T"] | Sequence[int],
    *,
    seconds: float | None = None,
    progress: Callable[[int, float], None] | None = None,
    stop: Callable[[Float[np.ndarray, " C"]], str] | None = None,
) -> Trial:
    """Stream a text through a session until the text ends, the cache is full, or time is up.

    A session that has read nothing reads BOS first, if its model expects that; BOS does not count.

    Args:
      name: what to call the run.
      session: the model and the cache; afterwards it stands where the run ended.
      tokens: ids of the text, at least one.
      seconds: stop after this long.
      progress: told after every chunk how many tokens there were, and what they cost on average.
      stop: asked after every chunk, with what each of its tokens cost, why to end there; "" goes on.
    """
    if not len(tokens):
        raise ValueError("the text is empty: there is nothing to read")
    begin = session.encode("")
    ids = np.concatenate([np.asarray(begin, np.int32), np.asarray(tokens, np.int32)])
    total = len(ids) if session.room is None else min(len(ids), session.room)
    ended = "" if total == len(ids) else f"full at {session.state.capacity:,} tokens"
    pieces: list[np.ndarray] = []
    times = [time.perf_counter()]
    cost, chunk = 0.0, session.chunk_size
    for start in range(0, total, chunk):
        nats = np.asarray(session.score(ids[start : min(start + chunk, total)]))
        pieces.append(nats if start else nats[len(begin) :])
        times.append(time.perf_counter())
        cost += float(pieces[-1].sum(dtype=np.float64))
        done = min(start + chunk, total) - len(begin)
        if progress is not None:
            progress(done, cost / max(done, 1))
        if seconds is not None and times[-1] - times[0] > seconds and start + chunk < total:
            ended = f"out of time at {done:,} tokens"
            break
        if stop is not None and (reason := stop(pieces[-1])):
            ended = f"{reason} at {done:,} tokens"
            break
    whole = np.diff(times)[:-1] if len(times) > 2 else np.diff(times)  # the last may be ragged, and compiles anew
    return Trial(
        name=name,
        nats=np.concatenate(pieces),
        memory=SlotMemory.from_state(session.state),
        ended=ended,
        seconds=times[-1] - times[0],
        tokens_per_second=min(chunk, total) / float(np.median(whole)),
        resident_bytes=resident_bytes(),
    )
