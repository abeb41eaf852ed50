"""Fields that chat and plain completions share: how tokens are chosen, where an answer ends, how it is sent."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.reading.fields import Fields, wrong_value
from streamjax.serving.requests import Request, Sampling

MOST_CHOICES = 128
LONGEST_UNSTREAMED = 1 << 17  # tokens of an answer that is held in memory until it is whole
_MOST_STOPS = 16  # OpenAI takes 4
_MOST_BIASES = 1024
_NO_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request says besides what it is about.

    n: answers. seed: of the first; the others count up from it. stream, include_usage: how it is sent.
    """

    sampling: Sampling
    n: int
    max_new_tokens: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    def requests(self, prompt: tuple[int, ...], **fields: Any) -> Iterator[Request]:
        """A request a choice."""
        for index in range(self.n):
            seed = (self.sampling.seed + index) % 2**31
            yield Request(
                prompt=prompt,
                max_new_tokens=self.max_new_tokens,
                sampling=dataclasses.replace(self.sampling, seed=seed),
                stop=self.stop,
                **fields,
            )


def read_options(fields: Fields, vocab_size: int, default_tokens: int) -> Options:
    """Take the shared fields.

    Args:
      fields: of the body.
      vocab_size: of the model.
      default_tokens: of an answer, where the request does not say.

    Raises:
      ApiError: 400, names the field.
    """
    fields.ignore(*_NO_EFFECT)
    fields.refuse("best_of", "use n", 1)
    stream = fields.take("stream", bool, default=False)
    how = Fields(fields.take("stream_options", dict, default={}), "stream_options.")
    include_usage = how.take("include_usage", bool, default=False)
    how.ignore("include_obfuscation")
    how.finish()
    if not stream and fields.take("stream_options") is not None:
        raise wrong_value("stream_options", "is only allowed where stream is true")
    most = _max_tokens(fields, default_tokens)
    if most > LONGEST_UNSTREAMED and not stream:
        raise wrong_value("max_tokens", f"must not exceed {LONGEST_UNSTREAMED} where stream is not true")
    n = fields.whole("n", 1, 1, MOST_CHOICES)
    stop = fields.strings("stop", _MOST_STOPS)
    assert n is not None
    return Options(_sampling(fields, vocab_size), n, most, stop, stream, include_usage)


def _max_tokens(fields: Fields, default: int) -> int:
    older, newer = fields.whole("max_tokens", None, 1), fields.whole("max_completion_tokens", None, 1)
    if older is not None and newer is not None:
        raise wrong_value("max_tokens", "must not be given beside max_completion_tokens")
    return next((value for value in (newer, older) if value is not None), default)


def _sampling(fields: Fields, vocab_size: int) -> Sampling:
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    values = {
        "temperature": fields.number("temperature", 1, 0, 2),
        "top_p": fields.number("top_p", 1, 0, 1),
        "min_p": fields.number("min_p", 0, 0, 1),
        "presence_penalty": fields.number("presence_penalty", 0, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", 0, -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 1, 0, 1e3),
        "top_k": max(fields.whole("top_k", 0, -1) or 0, 0),  # -1 means all to other servers
        "logit_bias": _biases(fields, vocab_size),
        "seed": secrets.randbelow(2**31) if seed is None else seed % 2**31,
    }
    if not values["top_p"]:  # of no probability at all there is no token: the likeliest alone
        values["top_p"], values["top_k"] = 1.0, 1
    try:
        return Sampling(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from error


def _biases(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = fields.take("logit_bias", dict, default={})
    if len(given) > _MOST_BIASES:
        raise wrong_value("logit_bias", f"takes at most {_MOST_BIASES} tokens, and has {len(given)}")
    biases = Fields(given, "logit_bias.")
    found = []
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise wrong_value("logit_bias", f"must have token ids below {vocab_size} for keys, and has {name[:32]!r}")
        found.append((int(name), biases.number(name, 0, -100, 100)))
    return tuple(found)
