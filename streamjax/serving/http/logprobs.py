"""Log-probabilities of tokens in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamjax.data.text.tokenizers import Tokenizer
from streamjax.serving.requests import TokenLogprob

_LEAST = -9999.0  # JSON has no infinity; OpenAI's word for it


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """What a token adds to a text, as a string and as bytes; what is no UTF-8 by itself is U+FFFD in the string."""
    data = tokenizer.token_bytes(token)
    if data is None:
        text = tokenizer.decode([token])
        return text, list(text.encode("utf-8", errors="replace"))
    return data.decode("utf-8", errors="replace"), list(data)


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Of a chat's answer."""
    content = []
    for entry in found:
        top = [_entry(tokenizer, token, value) for token, value in entry.top]
        content.append({**_entry(tokenizer, entry.token, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Of a plain completion, whose text so far has `offset` characters."""
    tokens, offsets = [], []
    for entry in found:
        text, _ = token_text(tokenizer, entry.token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [_number(entry.logprob) for entry in found],
        "top_logprobs": [
            {token_text(tokenizer, token)[0]: _number(value) for token, value in entry.top} for entry in found
        ],
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text, data = token_text(tokenizer, token)
    return {"token": text, "logprob": _number(logprob), "bytes": data}


def _number(logprob: float) -> float:
    return max(float(logprob), _LEAST)
