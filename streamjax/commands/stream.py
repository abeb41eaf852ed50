"""Read a text of any length through a cache of fixed size, and say how well the model predicts it.

    python -m infer.stream --input=book.txt
    python -m infer.stream --input=book.txt --model=Llama-3.2-1B --cache=streaming_llm:sinks=4,window=2044
    tail -f server.log | python -m infer.stream --save_state=log.stream        # Ctrl-C ends it, and saves
    python -m infer.stream --input=more.txt --load_state=log.stream --json=curve.json
    python -m infer.stream --input=builtin --cache=window --max_tokens=100000
    python -m infer.stream --input=book.txt --cache=dense --mesh=tensor=4 --cache_mesh=tensor=4     # eight devices
    python -m infer.stream --cache=snapkv --show_cache                         # what it holds, and its bytes

Perplexity is a token's, bits are a byte's; both are of everything read so far. Memory is the cache's, which does not
grow, and the process's. A text must be UTF-8.
"""

from __future__ import annotations

import collections
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm
from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.commands.flags.cache import CACHE_HELP, parse_cache
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.flags.meshes import define_cache_mesh, meshes_of
from streamjax.commands.flags.model import define_model, define_side_network, define_text, describe, load_model
from streamjax.commands.shell.input_files import open_input
from streamjax.commands.shell.outputs import check_outputs, write_json
from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import Stopped, attempt, complain, run_command
from streamjax.commands.shell.signals import Terminated, ending_signals
from streamjax.evaluation import Curve, StreamEncoder, human_bytes, peak_resident_bytes, resident_bytes
from streamjax.kv.description import describe_cache
from streamjax.models.nonfinite import NotFiniteError
from streamjax.streaming.interrupts import undisturbed


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("input", "-", "A text file; - is standard input, builtin is held-out text that comes with "
                        "Python.", flag_values=values)  # fmt: skip
    define_model(values)
    define_side_network(values)
    define_text(values)
    flags.DEFINE_string("cache", "streaming_llm", CACHE_HELP, flag_values=values)
    define_cache_mesh(values)
    flags.DEFINE_bool("show_cache", False, "Print what each layer caches and how many bytes that is, and end.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("max_tokens", None, "Stop after so many tokens.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result and the curve of perplexity.", flag_values=values)
    flags.DEFINE_string("load_state", None, "Go on with the stream in this folder.", flag_values=values)
    flags.DEFINE_string("save_state", None, "Folder for the stream at the end, also after Ctrl-C.", flag_values=values)
    refuse_empty(values, "input", "load_state", "save_state")


class Reader:
    """Feeds a text to a session, chunk by chunk, and keeps the account.

    A chunk's result is looked at when the next one has been handed to the device.

    Args:
      session: the stream.
      encoder: turns the text's bytes into ids.
    """

    def __init__(self, session: sj.Session, encoder: StreamEncoder):
        self.curve = Curve()
        self._session, self._encoder = session, encoder
        self._total: int | None = None  # tokens that there may be
        self._bar: tqdm.tqdm | None = None  # from the first result on: an error before it stands on a line of its own
        self._ids = session.encode("")  # encoded and not yet read; BOS where the stream begins
        self._skip = len(self._ids)
        self._encoded = 0
        self._fed = 0
        self._pending: Any = None
        self._started = time.perf_counter()
        self._times: collections.deque[float] = collections.deque(maxlen=1001)  # when whole chunks were done

    def read(self, data: Iterator[bytes], total_bytes: int | None, limit: int | None) -> str:
        """Read until the text, the limit or the cache ends; returns what ended it where that was not the text's end.

        Raises:
          ValueError: the text is empty, or not in UTF-8; what came before that has been read. A NotFiniteError where
            the model computes what is not finite.
        """
        for piece in itertools.chain(data, [None]):
            failure = None
            try:
                new = self._encoder.finish() if piece is None else self._encoder.push(piece)
            except ValueError as error:  # no UTF-8: what came before is read all the same
                new, failure = self._encoder.rest(), error
            self._ids += new
            self._encoded += len(new)
            if total_bytes is not None and self._encoded:
                guess = round(total_bytes * self._encoded / self._encoder.text_bytes)
                self._total = min(max(guess, self._encoded), limit or guess)
            ended = self._feed(limit, everything=piece is None or failure is not None)
            if ended:
                return ended
            if failure is not None:
                raise failure
        if not self._encoded:
            raise ValueError("the input is empty: there is nothing to read")
        return ""

    def _feed(self, limit: int | None, everything: bool) -> str:
        """Score whole chunks, or everything there is; returns why no more can be read."""
        session = self._session
        while len(self._ids) >= (1 if everything else session.chunk_size):
            width = min(session.chunk_size, len(self._ids))
            if session.room is not None:
                width = min(width, session.room)
                if not width:
                    return f"the cache is full at {session.tokens_seen:,} tokens (streaming_llm has no end)"
            if limit is not None:
                width = min(width, limit + self._skip - self._fed)
                if not width:
                    return f"--max_tokens={limit} reached"
            with undisturbed():
                ids = self._ids[:width]
                nats = session.score(ids, wait=False)
                if not self._fed:
                    nats, ids = nats[self._skip :], ids[self._skip :]
                del self._ids[:width]
                self._fed += width
                self.settle()
                self._pending = nats, ids
        return ""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            try:
                self.settle()
            finally:
                if self._bar is not None:
                    self._bar.close()

    def settle(self) -> None:
        """Account for the chunk that is under way.

        Raises:
          NotFiniteError: its result is not finite.
        """
        if self._pending is None:
            return
        (nats, ids), self._pending = self._pending, None
        nats = np.asarray(nats)
        if not len(nats):  # BOS alone
            return
        self._session.require_finite(nats, ids)
        self.curve.add(nats)
        if self._bar is None:
            self._bar = progress_bar(unit=" tokens")
        bar = self._bar
        bar.total = self._total
        bar.update(len(nats))
        if len(nats) >= self._session.chunk_size - self._skip:
            self._times.append(time.perf_counter())
        bar.set_postfix_str(
            f"perplexity {np.exp(self.curve.mean):.4g}, {self.bits_per_byte:.3f} bits/byte, "
            f"cache {human_bytes(self._session.cache_bytes)}, process {human_bytes(resident_bytes())}",
            refresh=False,
        )

    @property
    def bits_per_byte(self) -> float:
        """Of what was scored: exact for byte tokens, else as if all tokens encoded so far were equally long."""
        scored = self._encoder.text_bytes * self.curve.count / max(self._encoded, 1)
        return float(self.curve.total / np.log(2) / scored) if scored else float("nan")

    def _rate(self) -> float:
        """Tokens a second without compilation, which most chunks are spared; 0 where there are too few."""
        if len(self._times) < 4:
            return 0.0
        return self._session.chunk_size / float(np.median(np.diff(self._times)))

    def result(self) -> dict[str, Any]:
        """The account, as plain data."""
        seconds = time.perf_counter() - self._started
        return {
            "tokens": self.curve.count,
            "tokens_seen": self._session.tokens_seen,
            "nats_per_token": self.curve.mean,
            "perplexity": float(np.exp(self.curve.mean)),
            "bits_per_byte": self.bits_per_byte,
            "tokens_per_second": self._rate() or self.curve.count / seconds,
            "seconds": seconds,
            "cache_bytes": self._session.cache_bytes,
            "resident_bytes": resident_bytes(),
            "peak_resident_bytes": peak_resident_bytes(),
            "curve": [{"tokens": at, "nats_per_token": mean} for at, mean in self.curve.points()],
        }


def body(values: flags.FlagValues) -> None:
    check_outputs(reads=values.input, json=values.json, save_state=values.save_state)
    data, total_bytes = open_input(values.input)
    model, tokenizer = load_model(values, [values.cache])
    mesh = meshes_of(values).cache
    cache = parse_cache(values.cache, model.config.max_position, on_mesh=mesh is not None)
    if values.show_cache:
        print(sj.kv.describe(cache, model))
        return
    session = sj.Session(model, tokenizer, cache, chunk_size=values.chunk_size, cache_mesh=mesh)
    if values.load_state:
        session.load(user_path(values.load_state))
    print(describe(values.model, model, cache, session), file=sys.stderr)
    encoder = StreamEncoder(
        tokenizer,
        "standard input" if values.input == "-" else values.input,
        values.errors,
        continues=session.has_text,
        parse_special=values.parse_special,
    )
    reader = Reader(session, encoder)
    ended, status = "", 0
    failures: list[Exception] = []
    with ending_signals(signal.SIGINT):
        try:
            with reader:
                ended = reader.read(data, total_bytes, values.max_tokens)
        except KeyboardInterrupt:
            ended = "interrupted"
        except Terminated as terminated:
            ended, status = str(terminated), 128 + terminated.number
        except NotFiniteError:
            raise  # what is summed up and saved would hold it
        except (ValueError, OSError) as error:
            failures.append(error)
        # The stream cannot be read again: it is saved first, and nothing that fails keeps the rest from being tried.
        with undisturbed():
            result = {"model": values.model, "cache": describe_cache(cache), **reader.result()}
            unsaved = attempt(lambda: save(session, values.save_state))
            failures += unsaved + attempt(lambda: write(result, values.json))
    failures += attempt(lambda: report(result, ended, None if unsaved else values.save_state))
    for other in failures[1:]:
        complain(other)
    if failures:
        raise failures[0]
    if status:
        raise Stopped(status)


def save(session: sj.Session, folder: str | None) -> None:
    """Save the stream, if a folder is named and there is something to save."""
    if folder and session.tokens_seen:
        session.save(user_path(folder))


def write(result: dict[str, Any], file: str | None) -> None:
    """Write the numbers, if a file is named and there are any."""
    if file and result["tokens"]:
        write_json(file, result)


def report(result: dict[str, Any], ended: str, saved: str | None) -> None:
    """Print the summary."""
    if ended:
        print(ended)
    if result["tokens"]:
        _print_rows(result)
    if saved and result["tokens_seen"]:
        print(f"saved at token {result['tokens_seen']:,}: --load_state={saved} goes on from there")


def _print_rows(result: dict[str, Any]) -> None:
    rows = {
        "tokens": f"{result['tokens']:,} in {result['seconds']:.1f} s, {result['tokens_per_second']:,.0f} a second",
        "stream": f"{result['tokens_seen']:,} tokens from its beginning",
        "perplexity": f"{result['perplexity']:.4g} a token",
        "bits": f"{result['bits_per_byte']:.4f} a byte",
        "cache": human_bytes(result["cache_bytes"]),
        "process": f"{human_bytes(result['resident_bytes'])}, at most {human_bytes(result['peak_resident_bytes'])}",
    }
    for name, text in rows.items():
        print(f"{name:<12}{text}")


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
