"""The files of a Hugging Face tokenizer: `tokenizer.json`, and the settings beside it.

Whatever a damaged or foreign file holds ends in a ValueError of one line that names the file.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from streamjax.checkpoints import json_files
from streamjax.data.text.rust_panics import without_panic_reports

T = TypeVar("T")
_MOST_IDS = 2**31  # token ids are int32 everywhere else
_MOST_TOKENS = 2**24  # of a vocabulary, gaps included; the library counts through them all to write it


def guarded(file: Path, what: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call into the `tokenizers` library, whose failures say nothing of the file.

    Raises:
      ValueError: whatever went wrong, the panics of its Rust code included, which are no Exception in Python.
    """
    try:
        return function(*args, **options)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{file}: {what} ({one_line(error)})") from error
        raise


@dataclasses.dataclass(frozen=True)
class TokenizerParts:
    """What a tokenizer consists of, wherever it was read.

    Attributes:
      file: to name in messages.
      name: what to call the tokenizer.
      tokenizer: that of the `tokenizers` library.
      content: of a tokenizer.json, as the library writes it.
      settings: texts of special tokens: "bos_token", "eos_token", "pad_token".
      stop_ids: the ids that end a generation, besides that of "eos_token".
      chat_template: a jinja template, or None.
    """

    file: Path
    name: str
    tokenizer: tokenizers.Tokenizer
    content: dict[str, Any]
    settings: dict[str, Any]
    stop_ids: list[int]
    chat_template: str | None


def read_parts(path: Path) -> TokenizerParts:
    """The parts of a tokenizer from a folder with `tokenizer.json`, or the file itself, and the settings beside it."""
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    json_files.require_file(file)
    text = guarded(file, "not a readable tokenizer.json", file.read_text, encoding="utf-8")
    tokenizer, content = parse_tokenizer(file, text)
    settings = read_settings(folder)
    template = read_chat_template(folder, settings)
    return TokenizerParts(file, folder.name, tokenizer, content, settings, stop_ids(folder), template)


def parse_tokenizer(
    file: Path, text: str, what: str = "not a readable tokenizer.json"
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of the text of a `tokenizer.json`, and the content as the library writes it.

    Raises:
      ValueError: `file` is named, and `what` is wrong with it.
    """

    def parse() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        word, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
        if largest >= _MOST_TOKENS:
            raise ValueError(f"token {word!r} has the id {largest}: ids must be below {_MOST_TOKENS}")
        return tokenizer, json.loads(tokenizer.to_str())

    return guarded(file, what, without_panic_reports()(parse))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file without its null entries; {} where there is no file, nor a link that leads nowhere."""
    if not os.path.lexists(file):
        return {}
    return {key: value for key, value in json_files.read_json(file).items() if value is not None}


def read_settings(folder: Path) -> dict[str, Any]:
    """`special_tokens_map.json` and `tokenizer_config.json`, of which the second counts where both say something."""
    return read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")


def special_token(settings: dict[str, Any], key: str, folder: Path) -> str | None:
    """The text of a special token such as "bos_token"; None where the settings have none."""
    token = settings.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise ValueError(f"{folder}: {key} must be the text of a token, not {one_line(repr(token))}")
    return token or None


def stop_ids(folder: Path) -> list[int]:
    """The ids that end a generation by `generation_config.json`."""
    file = folder / "generation_config.json"
    stops = read_json(file).get("eos_token_id", [])
    stops = stops if isinstance(stops, list) else [stops]
    for token in stops:
        if type(token) is not int or not 0 <= token < _MOST_IDS:
            raise ValueError(f"{file}: eos_token_id must be token ids, not {one_line(repr(token))}")
    return stops


def read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The default template of a model: `chat_template.jinja`, or what `tokenizer_config.json` holds."""
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        json_files.require_file(file)
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({one_line(error)})") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        except (TypeError, KeyError) as error:
            message = "chat_template must be a template, or a list of entries with name and template"
            raise ValueError(f"{folder / 'tokenizer_config.json'}: {message}") from error
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a template, not {type(template).__name__}"
        )
    return template


def one_line(error: Any) -> str:
    """What an error says, short and in one line."""
    return " ".join(str(error).split())[:200]
