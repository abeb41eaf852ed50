"""Several caches on one text: the runs, with a progress bar each, and their table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm

import streamjax as sj
from streamjax.commands.shell.inputs import open_input
from streamjax.commands.shell.progress import progress_bar
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation import SlotMemory, StreamEncoder, Trial, human_bytes, run_trial
from streamjax.training.run.signals import StopSignals


def read_text(
    name: str, tokenizer: Tokenizer, limit: int | None, parse_special: bool = False
) -> tuple[list[int], float]:
    """The ids of a text, at most `limit`, and how many bytes one is on average; no more is read than that takes.

    Raises:
      ValueError: the text is empty, or not in UTF-8; or it may never end, and there is no limit.
    """
    if limit is None and (name == "-" or (Path(name).expanduser().exists() and not Path(name).expanduser().is_file())):
        raise ValueError(f"--input={name} may never end, and the caches all read the same text: give --max_tokens")
    pieces, _ = open_input(name)
    encoder, ids = StreamEncoder(tokenizer, name, parse_special=parse_special), []
    for data in pieces:
        ids += encoder.push(data)
        if limit is not None and len(ids) >= limit:
            break
    else:
        ids += encoder.finish()
    if not ids:
        raise ValueError(f"{name} is empty: there is nothing to read")
    return ids[:limit], encoder.text_bytes / len(ids)


def dense_capacity(model: sj.Decoder, tokens: int, memory_bytes: float | None) -> int:
    """How many tokens a dense cache may hold: `tokens`, or what fits into so much memory."""
    if memory_bytes is None:
        return tokens
    one = SlotMemory.of(sj.init_state(model, sj.kv.preset("dense", capacity=1)))
    fit = int(memory_bytes // sum(one.slot_bytes))
    if fit < 1:
        raise ValueError(f"a dense cache of one token takes {human_bytes(sum(one.slot_bytes))}: raise --dense_memory")
    return min(tokens, fit)


def run_sessions(
    sessions: dict[str, sj.Session], ids: Sequence[int], seconds: float | None = None
) -> tuple[list[Trial], int]:
    """Stream a text through every session, one after the other.

    Ctrl-C, SIGTERM and SIGHUP end it after the chunk that is under way. Returns what was measured until then, and the
    signal's number, else 0.
    """
    trials = []
    width = max(len(name) for name in sessions)
    with StopSignals() as signals:
        for name, session in sessions.items():
            with progress_bar(total=len(ids), desc=f"{name:<{width}}", unit=" tokens") as bar:

                def show(done: int, mean: float, bar: tqdm.tqdm = bar) -> None:
                    bar.set_postfix_str(f"perplexity {np.exp(mean):.4g}", refresh=False)
                    bar.update(done - bar.n)

                stop = lambda: signals.received  # noqa: E731
                trials.append(run_trial(name, session, ids, seconds=seconds, progress=show, stop=stop))
            if signals.received:
                break
    return trials, signals.received or 0


def table(trials: Sequence[Trial], borders: Sequence[int], bytes_per_token: float) -> str:
    """The runs as text: perplexity a token and bits a byte between borders, memory and speed.

    Args:
      trials: the runs.
      borders: places in the text where columns end; the text's end is one more.
      bytes_per_token: of the text.
    """
    end = max(len(trial.nats) for trial in trials)
    edges = [0, *(border for border in borders if border < end), end]
    spans = list(itertools.pairwise(edges))
    head = ["cache", *(_span(*span, last=span[1] == end) for span in spans), "holds", "tokens/s", ""]
    rows = [head]
    for trial in trials:
        cells = []
        for start, stop in spans:
            part = trial.part(start, stop)
            if not part.tokens:
                cells.append("-")
                continue
            cells.append(f"{part.perplexity:,.4g} ({part.bits_per_byte(bytes_per_token):.2f})")
        held = human_bytes(trial.memory.in_use(len(trial.nats)))
        rows.append([trial.name, *cells, held, f"{trial.tokens_per_second:,.0f}", trial.ended])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _span(start: int, stop: int, last: bool) -> str:
    if start == 0:
        return f"first {stop:,}"
    return f"{start:,} to the end" if last else f"{start:,} to {stop:,}"
