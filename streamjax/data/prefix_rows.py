"""Rows for models that look at a prompt before they read it: two losses in a batch (JRT-RNN, 2407.05483, section 4.2).

A prefix is seen whole, so predicting its next token would be copying. Of its tokens a share is hidden behind a mask and
is to be guessed, as BERT does it, and the tokens behind it predict their next one, as ever. The loss is

    (mean over predicted tokens + weight * mean over hidden ones) / (1 + weight)

in the means of a batch. Here the last token of a prefix is never hidden, and predicts what comes behind it: a stream
that goes on from its prompt asks for just that, and the paper's code leaves it out.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int32


def prefix_batch(
    tokens: Int32[np.ndarray, "B T1"],
    prefix: Int32[np.ndarray, " B"],
    mask_id: int,
    *,
    random: np.random.Generator,
    share: float = 0.15,
    weight: float = 0.25,
) -> dict[str, Int32[np.ndarray, "..."] | Float[np.ndarray, "..."]]:
    """A batch for `sj.training.loss_and_grad`, with the two losses of prefix linear attention.

    Args:
      tokens: rows of T + 1 ids.
      prefix: tokens of each row that are its prefix; 0 to T.
      mask_id: what stands where a token is hidden.
      random: draws which.
      share: of the prefix's tokens that are hidden.
      weight: of the loss on hidden tokens, beside 1 for the others.

    Returns:
      tokens, targets and weights, [B, T], and prefix, [B].

    Raises:
      ValueError: a prefix that is longer than its row, or a share that is not from 0 to below 1.

    Example:
      >>> rows = np.arange(8, dtype=np.int32)[None]
      >>> batch = prefix_batch(rows, np.array([4], np.int32), 99, random=np.random.default_rng(1), share=0.5)
      >>> batch["tokens"].tolist(), batch["targets"].tolist()
      ([[0, 1, 99, 3, 4, 5, 6]], [[1, 2, 2, 4, 5, 6, 7]])
      >>> batch["weights"].tolist()
      [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    inputs, length = tokens[:, :-1], tokens.shape[1] - 1
    if np.any(prefix < 0) or np.any(prefix > length):
        raise ValueError(f"prefix is {prefix.tolist()}: a row has {length} tokens, so use 0 to {length}")
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}: use 0 to below 1")
    place, ends = np.arange(length), prefix[:, None] - 1
    hidden = (place < ends) & (random.uniform(size=inputs.shape) < share)
    predicted = place >= np.maximum(ends, 0)
    on_hidden = weight * np.sum(predicted) / max(np.sum(hidden), 1)
    return {
        "tokens": np.where(hidden, np.int32(mask_id), inputs),
        "targets": np.where(hidden, inputs, tokens[:, 1:]),
        "weights": np.where(hidden, on_hidden, predicted).astype(np.float32),
        "prefix": prefix.astype(np.int32),
    }
