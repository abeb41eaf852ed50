"""Output in a given form: JSON, a JSON schema or calls of tools, held to it by llguidance, token by token."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
from jaxtyping import Bool
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from streamjax.data.text.hugging_face import HFTokenizer
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.reading.fields import Fields

# As json.dumps writes it, so that white space has an end. Keywords that are not there are refused.
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LARGEST = 1 << 16  # characters of a grammar


class Grammars:
    """Makes constraints for one model.

    Args:
      tokenizer: whose ids are constrained.
      vocab_size: of the model, which may have more ids than the tokenizer.
      stop_ids: which may come where the form may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]):
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, stop_ids
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def json_schema(self, schema: dict[str, Any], param: str) -> TokenConstraint:
        """Output is one JSON value that the schema describes."""
        return self.grammar(grammar_of_schema(schema, param), param)

    def grammar(self, grammar: str, param: str) -> TokenConstraint:
        """Output is what a grammar of llguidance describes.

        Args:
          grammar: in Lark's form, or as JSON.
          param: the field of the request that it comes from.

        Raises:
          ApiError: 400, the grammar is too large or not possible, or the tokenizer cannot be constrained.
        """
        if len(grammar) > _LARGEST:
            raise ApiError(400, f"'{param}' is too large: {len(grammar):,} characters", param, "invalid_schema")
        tokenizer = self._llguidance(param)
        limits = LLParserLimits(verbose_errors=False)
        failed, reasons = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=limits)
        if failed:
            raise ApiError(400, f"'{param}' is not possible: {_line(reasons[0])}", param, "invalid_schema")
        return TokenConstraint(
            LLMatcher(tokenizer, grammar, log_level=0, limits=limits), self._vocab_size, self._stop_ids
        )

    def _llguidance(self, param: str) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                if not self._stop_ids:
                    raise ApiError(400, f"'{param}' is not possible: the model has no token that ends a text", param)
                try:
                    self._made = _llguidance_tokenizer(self._tokenizer, self._vocab_size, self._stop_ids)
                except ValueError as error:
                    raise ApiError(400, f"'{param}' is not possible: {_line(str(error))}", param) from error
            return self._made


class TokenConstraint:
    """A `Constraint` over a matcher of llguidance.

    Args:
      matcher: at the beginning.
      vocab_size: of the model.
      stop_ids: that end a text.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop_ids: tuple[int, ...]):
        self._matcher, self._vocab_size, self._stop_ids = matcher, vocab_size, stop_ids

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """Tokens that may come now. A form that has become impossible, or too complex, may only end."""
        mask = np.zeros(self._vocab_size, bool)
        if self._matcher.is_error() or self._matcher.is_stopped():
            mask[list(self._stop_ids)] = True
            return mask
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        count = min(len(bits), self._vocab_size)
        mask[:count] = bits[:count]
        if not mask.any():
            mask[list(self._stop_ids)] = True
        return mask

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        if token not in self._stop_ids:
            self._matcher.consume_token(token)

    def copy(self) -> TokenConstraint:
        """Another one at the same place, for another choice."""
        return TokenConstraint(self._matcher.deep_copy(), self._vocab_size, self._stop_ids)


def grammar_of_schema(schema: dict[str, Any], param: str) -> str:
    """A grammar of llguidance for JSON by a schema."""
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_STYLE)
    except ValueError as error:
        raise ApiError(400, f"'{param}' is not possible: {_line(str(error))}", param, "invalid_schema") from error


def read_response_format(fields: Fields, grammars: Grammars) -> TokenConstraint | None:
    """Take `response_format`: text, json_object, or json_schema with a schema.

    Raises:
      ApiError: 400, names the field.
    """
    given = fields.take("response_format", dict)
    if given is None:
        return None
    about = Fields(given, "response_format.")
    about.required("type", str)
    kind = about.one_of("type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        named = Fields(about.required("json_schema", dict), "response_format.json_schema.")
        schema = named.required("schema", dict)
        named.ignore("name", "description", "strict")
        named.finish()
    about.finish()
    if kind == "text":
        return None
    if kind == "json_object":
        return grammars.json_schema({"type": "object"}, "response_format")
    return grammars.json_schema(schema, "response_format.json_schema.schema")


def _llguidance_tokenizer(tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> LLTokenizer:
    """llguidance's view of a tokenizer.

    Raises:
      ValueError: it cannot say which bytes its tokens are.
    """
    size = max(vocab_size, tokenizer.vocab_size)
    if isinstance(tokenizer, HFTokenizer):
        if tokenizer.decoding == "text":
            raise ValueError("the bytes of this tokenizer's tokens are not known")
        return LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=list(stop_ids))
    return LLTokenizer(TokenizerWrapper(_Bytes(tokenizer, size)), n_vocab=size, eos_token=list(stop_ids))


class _Bytes:
    """A tokenizer of bytes as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(i) or f"<{i}>".encode() for i in range(size)]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
