"""What the command lines share: flags, start-up, and errors of one line."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh

import streamjax as sj
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation import human_bytes
from streamjax.kv.presets.registry import Built
from streamjax.kv.tiers.sink_window import SinkWindow
from streamjax.parallel.mesh import make_mesh

SHIPPED_MODEL = Path(__file__).parents[2] / "models" / "stdlib_byte"
BUILTIN = "builtin"
_MESH_AXES = ("data", "fsdp", "context", "tensor")
_COMMON = ("help", "traceback", "compilation_cache")  # flags of every command
Define = Callable[[flags.FlagValues], None]


class Stopped(Exception):
    """Ends a command with this exit status, its message already given."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def run_command(
    about: str | None, define: Sequence[Define], body: Callable[[flags.FlagValues], None], argv: list[str]
) -> int:
    """Parse flags, run a command and return its exit status; whatever a user can cause is one line on stderr.

    Args:
      about: the module's docstring, shown by --help.
      define: functions that define flags; `define_model` among them, or called by them.
      body: the command; it runs under the mesh of --mesh.
      argv: the program's name and its arguments.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    flags.DEFINE_bool("traceback", False, "Show where in the program an error came from.", flag_values=values)
    flags.DEFINE_string(
        "compilation_cache",
        str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "streamjax" / "compiled"),
        "Folder where compiled programs are kept for the next start; empty for none.",
        flag_values=values,
    )
    for function in define:
        function(values)
    logging.set_verbosity(logging.ERROR)
    try:
        rest = values(argv)[1:]
        if rest:
            raise flags.Error(f"unexpected argument {rest[0]!r}: options are written --name=value")
    except flags.Error as error:
        return _fail(f"{error} (--help lists all options)", 2)
    if values.help:
        print(help_text(about or "", values))
        return 0
    try:
        if values.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", str(Path(values.compilation_cache).expanduser()))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        mesh = parse_mesh(values.mesh)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            body(values)
    except Stopped as stopped:
        return stopped.status
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the output has gone
        return 1
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if values.traceback:
            raise
        complain(error)
        return 1
    return 0


def complain(error: Exception) -> None:
    """Say in one line on stderr what went wrong."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        _fail(f"{error.filename}: {error.strerror}", 1)
    else:
        _fail(str(error) or type(error).__name__, 1)


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())[:500]}", file=sys.stderr)
    return status


def help_text(about: str, values: flags.FlagValues) -> str:
    """The text of --help: what the command is, then its flags in the order in which they were defined."""
    names = [name for name in values if name not in (*_COMMON, "h")]
    lines = [about.strip(), "", "Options:"]
    for name in [*names, *_COMMON]:
        flag = values[name]
        default = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
        about_default = "" if default is None or default is False or default == "" else f"  [{default}]"
        lines.append(f"  --{name}{about_default}")
        about_flag = flag.help.partition(";\n")[0]  # absl adds to the text of flags that may be repeated
        lines += textwrap.wrap(about_flag, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def define_model(values: flags.FlagValues) -> None:
    """Flags that choose the model."""
    flags.DEFINE_string(
        "model",
        str(SHIPPED_MODEL),
        "Folder of a model: Hugging Face (config.json and *.safetensors), or a streamjax checkpoint. By default the "
        "small byte-level model that comes with streamjax.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer", None, "Folder with tokenizer.json; the model's own by default, bytes if none.", flag_values=values
    )
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Of the weights; bfloat16 on TPU and GPU, float32 on CPU by default.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "mesh", None, "Devices to split the model over, such as tensor=4 or fsdp=2,tensor=4; -1 means those that are "
        "left. tensor splits heads, MLPs, the vocabulary and the cache; fsdp splits weights, which are gathered where "
        "they are used; data has nothing to split in a single stream. One device by default.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("chunk_size", 512, "Tokens read in one step.", lower_bound=1, flag_values=values)


def define_sampling(values: flags.FlagValues) -> None:
    """Flags that say how tokens are chosen."""
    number, whole = flags.DEFINE_float, flags.DEFINE_integer
    number("temperature", 0.8, "0 always takes the likeliest token.", lower_bound=0, flag_values=values)
    whole("top_k", 0, "Choose among the k likeliest tokens; 0: all.", lower_bound=0, flag_values=values)
    number("top_p", 0.95, "Choose among the likeliest tokens that together have this probability.", flag_values=values)
    number("min_p", 0.0, "Choose among tokens at least this share as likely as the likeliest.", flag_values=values)
    number("repetition_penalty", 1.0, "Above 1, tokens that were used become less likely.", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "Text that ends an answer, \\n for a line's end; may be repeated.", flag_values=values
    )
    whole("seed", 0, "Of the random choices.", flag_values=values)
    whole("max_new_tokens", 512, "The longest answer.", lower_bound=0, flag_values=values)


def sampler_of(values: flags.FlagValues) -> sj.Sampler:
    """The sampler that the flags describe."""
    return sj.Sampler(
        repetition_penalty=values.repetition_penalty,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
    )


def stop_strings(values: flags.FlagValues) -> list[str]:
    """The strings that end an answer."""
    return [word.replace("\\n", "\n").replace("\\t", "\t") for word in values.stop]


def sampling_was_chosen(values: flags.FlagValues) -> bool:
    """Whether any flag of the sampler was given."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return any(values[name].present for name in names)


CACHE_HELP = (
    "NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as streaming_llm:sinks=4,window=1020, window:window=1024 or "
    "dense:capacity=8192. Without options the cache is made to fit the length the model was trained at."
)


def load_model(values: flags.FlagValues, caches: Sequence[str] = ()) -> tuple[sj.Decoder, Tokenizer]:
    """The model and the tokenizer that the flags name; mistakes in `caches` come to light before anything is read."""
    for cache in caches:
        parse_cache(cache, sys.maxsize)
    path = Path(values.model).expanduser()
    if not path.is_dir():
        raise ValueError(f"no model folder {path}: give --model=FOLDER with config.json and *.safetensors")
    tokenizer = sj.load_tokenizer(Path(values.tokenizer).expanduser() if values.tokenizer else path)
    return sj.load(path, dtype=values.dtype, mesh=parse_mesh(values.mesh)), tokenizer


def parse_mesh(text: str | None) -> Mesh | None:
    """The mesh that `--mesh` describes, over all devices; None where there is no text.

    Raises:
      ValueError: an unknown axis, a size that is no number, or sizes that do not fit the devices.
    """
    if not text:
        return None
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in _MESH_AXES:
            raise ValueError(f"--mesh={text}: no mesh axis {axis!r}; {_nearest(axis, _MESH_AXES)}")
        if axis in sizes or not re.fullmatch(r"-?\d+", size):
            raise ValueError(f"--mesh={text}: give {axis} once, with a number of devices, such as {axis}=4")
        sizes[axis] = int(size)
    return make_mesh(**sizes)  # type: ignore[arg-type]  # every key is an axis


def parse_cache(text: str, trained_length: int, dense_capacity: int | None = None) -> Built:
    """The cascade that `--cache` describes; see `CACHE_HELP`.

    Args:
      text: name and options.
      trained_length: tokens that the model saw at once in training: where `window` is not given and the default cache
        is longer than that, the window is what fits.
      dense_capacity: of `dense`, where it is not given.

    Raises:
      ValueError: an unknown name or option, with the nearest known one; a value that is no number.
    """
    name, options = sj.kv.parse_preset(text)
    known = sj.kv.presets()[name].options
    if name == "dense" and dense_capacity is not None:
        options.setdefault("capacity", dense_capacity)
    cache = sj.kv.preset(name, **options)
    if isinstance(cache, tuple) or cache.reach is None or cache.slots <= trained_length:
        return cache
    if "window" in known and "window" not in options:
        options["window"] = max(known["window"] - (cache.slots - trained_length), 1)
        cache = sj.kv.preset(name, **options)
    return cache


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def describe(path: str, model: sj.Decoder, cache: Built, session: sj.Session) -> str:
    """One line about what will run."""
    config = model.config
    return (
        f"{Path(path).name}: {config.family}, {config.parameter_count / 1e6:.1f}M parameters, trained at "
        f"{config.max_position:,} tokens; cache {describe_cache(cache)}, {human_bytes(session.cache_bytes)}"
    )


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write plain data; the folder is made."""
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def describe_cache(cache: Built | Sequence[sj.kv.Cache]) -> str:
    """A cache in short, such as "Sink(4) > Window(508)"."""
    if isinstance(cache, Sequence):
        kinds = list(dict.fromkeys(map(describe_cache, cache)))
        return kinds[0] + (f" and {len(kinds) - 1} other arrangements in {len(cache)} layers" if kinds[1:] else "")
    if isinstance(cache, sj.kv.ChunkMemory):
        return f"ChunkMemory({cache.capacity_tokens:,})"
    if isinstance(cache, sj.kv.HeadGroups):
        return " | ".join(f"{describe_cache(cascade)} in {len(heads)} heads" for heads, cascade in cache.groups)
    if not isinstance(cache, sj.kv.Cascade):
        return repr(cache)
    parts = []
    for tier in cache.tiers:
        match tier:
            case SinkWindow(sinks=sinks, window=window):
                parts += [f"Sink({sinks})", f"Window({window})"]
            case sj.kv.Sink(size=size) | sj.kv.Window(size=size) | sj.kv.Full(capacity=size):
                parts.append(f"{type(tier).__name__}({size:,})")
            case sj.kv.Pages(size=size, capacity=capacity, top_k=top_k):
                parts.append(f"Pages({capacity:,} in {size}s, top {top_k})")
            case _:
                parts.append(repr(tier))
    return " > ".join(parts)
