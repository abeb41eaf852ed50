"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p and repetition penalty."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.field_checks import Count, Fraction, Interval, NotNegative, Positive, check_fields


def first_largest(logits: Float[Array, "B V"]) -> Int32[Array, " B"]:
    """`argmax` of each row. Two plain reductions, which a CPU makes in wide registers, take a fraction of its time.

    With a NaN in a row it is the last index.
    """
    last = logits.shape[-1] - 1
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, index, last), axis=-1)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to sample; static and hashable. Filters apply in the order of the fields, as in Hugging Face.

    repetition_penalty: logits of tokens that were seen are divided by it where positive, multiplied where negative
    (CTRL, 1909.05858); 1 does nothing. temperature: 0 is greedy. top_k: keep the k best tokens; 0 keeps all. top_p:
    keep the smallest set of best tokens that holds this probability (1904.09751); 1 keeps all. min_p: keep tokens at
    least this share as likely as the best one (2407.01082); 0 keeps all.

    Example:
      >>> sampler = sj.Sampler(temperature=0.7, top_p=0.9)
      >>> state, tokens = sj.generate(model, state, prompt, max_new_tokens=8, sampler=sampler, key=jax.random.key(0))
      >>> tokens.shape
      (1, 8)
    """

    repetition_penalty: Positive = 1.0
    temperature: NotNegative = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Interval(0, 1, above=True)] = 1.0
    min_p: Fraction = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def filter(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None = None) -> Float[Array, "B V"]:
        """Logits after penalty, temperature and filters; removed tokens are -inf. Greedy applies the penalty only."""
        if self.repetition_penalty != 1.0:
            if seen is None:
                raise ValueError("repetition_penalty needs the tokens seen so far")
            penalised = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(seen, penalised, logits)
        if self.greedy:
            return logits
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kept = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits >= kept, logits, -jnp.inf)
        if self.top_p < 1:
            ordered = -jnp.sort(-logits, axis=-1)
            weights = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(weights, axis=-1) - weights  # probability of all better tokens
            kept = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= kept, logits, -jnp.inf)
        if self.min_p > 0:
            floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(self.min_p))
            logits = jnp.where(logits >= floor, logits, -jnp.inf)
        return logits

    def sample(
        self, logits: Float[Array, "B V"], key: Array | None, seen: Bool[Array, "B V"] | None = None
    ) -> Int32[Array, " B"]:
        """One token a row. `key` may be None for greedy."""
        logits = self.filter(logits.astype(jnp.float32), seen)
        if self.greedy:
            return first_largest(logits)
        if key is None:
            raise ValueError("sampling needs a PRNG key: pass key=jax.random.key(seed), or temperature=0")
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
