"""Flags that choose the model and its devices, and the model that they choose."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.checkpoints.gguf_header import is_gguf
from streamjax.commands.flags.cache import parse_cache
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.flags.meshes import meshes_of
from streamjax.commands.shell.input_files import BUILTIN
from streamjax.data.text.tokenizers import Tokenizer, require_tokenizer
from streamjax.evaluation import human_bytes
from streamjax.kv.description import describe_cache
from streamjax.kv.presets.registry import Built

_MODELS = Path(__file__).parents[3] / "models"  # of the repository; an installation from a wheel has none


def shipped_model(name: str) -> str | None:
    """The folder of a model that comes with the repository; None where streamjax is installed without it."""
    folder = _MODELS / name
    return str(folder) if folder.is_dir() else None


def no_model() -> ValueError:
    """What a user is told who names no model, where there is none to take."""
    return ValueError(
        "--model is missing, and this installation has none of its own: give --model=FOLDER with config.json and "
        "*.safetensors, or run the command in a clone of streamjax's repository, which has small ones in models/"
    )


def define_model(values: flags.FlagValues) -> None:
    """Flags that choose the model."""
    flags.DEFINE_string(
        "model",
        shipped_model("stdlib_byte"),
        "Folder of a model: Hugging Face (config.json and *.safetensors), or a streamjax checkpoint; or a .gguf file. "
        "In a clone of streamjax's repository it is by default a small model that comes with it.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "Folder with tokenizer.json, or a .gguf file; the model's own by default, bytes if none.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Of the weights; bfloat16 on TPU and GPU, float32 on CPU by default.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "weights", None, ["int8", "int4"], "Quantise weights as they are read: int8 with a scale a channel, int4 with "
        "a scale and an offset for 32 weights. As they are by default.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "mesh", None, "Devices to split the model over, such as tensor=4 or fsdp=2,tensor=4; -1 means those that are "
        "left. tensor splits heads, MLPs, the vocabulary and the cache; fsdp splits weights, which are gathered where "
        "they are used; expert splits the experts of a mixture; data has nothing to split in a single stream. One "
        "device by default.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("chunk_size", 512, "Tokens read in one step.", lower_bound=1, flag_values=values)
    refuse_empty(values, "model", "tokenizer")


def define_text(values: flags.FlagValues) -> None:
    """Flags that say how a text is read: bytes that are no text, special tokens."""
    flags.DEFINE_enum("errors", "strict", ["strict", "replace"], "What to do with bytes that are not UTF-8: end with "
                      "an error, or read U+FFFD.", flag_values=values)  # fmt: skip
    define_parse_special(values)


def define_read_text(values: flags.FlagValues) -> None:
    """Flags of a model that reads a text as a whole: those of the model, but for its chunks, and of the text."""
    define_model(values)
    delattr(values, "chunk_size")
    define_text(values)
    flags.DEFINE_string("input", BUILTIN, "A text file, - for standard input, or builtin: a text of the package.",
                        flag_values=values)  # fmt: skip


def define_parse_special(values: flags.FlagValues) -> None:
    """The flag that says what special tokens in a text are."""
    flags.DEFINE_bool(
        "parse_special", False, "Whether special tokens that are written out in a text, such as <|im_end|>, are those "
        "tokens; otherwise they are text.", flag_values=values,
    )  # fmt: skip


def load_model(values: flags.FlagValues, caches: Sequence[str] = ()) -> tuple[sj.Decoder, Tokenizer]:
    """The model and the tokenizer that the flags name; mistakes in `caches` come to light before anything is read."""
    for cache in caches:
        parse_cache(cache, sys.maxsize, on_mesh=bool(values.cache_mesh) if "cache_mesh" in values else False)
    if values.model is None:
        raise no_model()
    path = user_path(values.model)
    if not path.is_dir() and not (is_gguf(path) and path.exists()):
        raise ValueError(
            f"no model folder {path}: give --model=FOLDER with config.json and *.safetensors, or a .gguf file"
        )
    tokenizer = sj.load_tokenizer(user_path(values.tokenizer) if values.tokenizer else path)
    model = sj.load(path, dtype=values.dtype, mesh=meshes_of(values).model, weights=values.weights)
    require_tokenizer(
        tokenizer, model.config.vocab_size, f"{values.tokenizer or path} has no tokenizer.json: give --tokenizer=FOLDER"
    )
    if "side_network" in values and values.side_network is not None:
        model = sj.with_side_network(model, user_path(values.side_network))
    return model, tokenizer


def define_side_network(values: flags.FlagValues) -> None:
    """The flag that puts a side network beside the model; `load_model` does it."""
    flags.DEFINE_string(
        "side_network", None, "File of a side network of the model (python -m train.side_network), which recalls what "
        "the cache long_mem has remembered. None by default.", flag_values=values,
    )  # fmt: skip
    refuse_empty(values, "side_network")


def describe(path: str, model: sj.Decoder, cache: Built, session: sj.Session) -> str:
    """One line about what will run."""
    config = model.config
    return (
        f"{Path(path).name}: {config.family}, {config.parameter_count / 1e6:.1f}M parameters, trained at "
        f"{config.max_position:,} tokens; cache {describe_cache(cache)}, {human_bytes(session.cache_bytes)}"
    )
