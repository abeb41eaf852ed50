"""How likely a model finds held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from streamjax.data import Tokenizer
from streamjax.models.decoder import Decoder
from streamjax.streaming.state import StreamState
from streamjax.training.run.state import shard_batch
from streamjax.training.run.step import eval_step, streaming_eval_step


def evaluate(
    model: Decoder,
    batches: Iterable[Any],
    tokenizer: Tokenizer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    stream: StreamState | None = None,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """Loss in nats per token and perplexity over `batches`; bits per byte too if the tokenizer's tokens are bytes.

    With `stream`, a state of streams that have seen nothing (it is donated), each row of a batch continues that row of
    the batch before it, read in chunks of at most `chunk_size` tokens.
    """
    sums = []
    for batch in batches:
        batch = shard_batch(batch, mesh)
        if stream is None:
            found = eval_step(model, batch)
        else:
            stream, *found = streaming_eval_step(model, stream, batch, chunk_size)
        sums.append(tuple(found))
    total, weight = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
    loss = float(total / weight) if weight > 0 else 0.0
    values = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
    if tokenizer is not None and tokenizer.name == "bytes":
        values["eval_bits_per_byte"] = loss / math.log(2.0)
    return values
