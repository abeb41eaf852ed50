"""Several caches on one text: the runs, with a progress bar each, their table, and what it says in words."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tqdm
from jaxtyping import Float

import streamjax as sj
from streamjax.commands.shell.input_files import open_input
from streamjax.commands.shell.progress import progress_bar
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation import SlotMemory, StreamEncoder, Trial, human_bytes, run_trial
from streamjax.training.run.signals import StopSignals

DENSE, WINDOW, SINKS = "dense", "window", "sinks + window"  # the runs that `verdict` knows
_RECENT = 1024  # tokens
_APART = 1.25  # perplexity, against the cache with sinks, from which on words say so


def read_text(
    name: str, tokenizer: Tokenizer, limit: int | None, errors: str = "strict", parse_special: bool = False
) -> tuple[list[int], float]:
    """The ids of a text, at most `limit`, and how many bytes one is on average; no more is read than that takes.

    Raises:
      ValueError: the text is empty, or not in UTF-8; or it may never end, and there is no limit.
    """
    if limit is None and name == "-":
        raise ValueError(f"--input={name} may never end, and the caches all read the same text: give --max_tokens")
    pieces, _ = open_input(name)
    called = "standard input" if name == "-" else name
    encoder, ids = StreamEncoder(tokenizer, called, errors, parse_special=parse_special), []
    for data in pieces:
        ids += encoder.push(data)
        if limit is not None and len(ids) >= limit:
            break
    else:
        ids += encoder.finish()
    if not ids:
        raise ValueError(f"{called} is empty: there is nothing to read")
    return ids[:limit], encoder.text_bytes / len(ids)


def dense_capacity(model: sj.Decoder, tokens: int, memory_bytes: float | None) -> int:
    """How many tokens a dense cache may hold: `tokens`, or what fits into so much memory."""
    if memory_bytes is None or math.isinf(memory_bytes):
        return tokens
    one = SlotMemory.from_state(sj.init_state(model, sj.kv.preset("dense", capacity=1)))
    fit = int(memory_bytes // sum(one.slot_bytes))
    if fit < 1:
        raise ValueError(f"a dense cache of one token takes {human_bytes(sum(one.slot_bytes))}: raise --dense_memory")
    return min(tokens, fit)


def run_sessions(
    sessions: Mapping[str, Callable[[], sj.Session]],
    ids: Sequence[int],
    limits: Mapping[str, float] | None = None,
    give_up: Callable[[str, Sequence[Trial]], Callable[[np.ndarray], str]] | None = None,
) -> tuple[list[Trial], int]:
    """Stream a text through sessions, one after the other.

    Ctrl-C, SIGTERM and SIGHUP end it after the chunk that is under way.

    Args:
      sessions: by name; each is made when its turn comes, so that what was made for the ones before can have gone.
      ids: the text.
      limits: seconds from the beginning by which a run must have ended.
      give_up: is given a run's name and the runs before it, and returns what `run_trial` asks whether to stop.

    Returns:
      What was measured until the end, and the number of the signal that ended it, else 0.
    """
    trials: list[Trial] = []
    width = max(len(name) for name in sessions)
    started = time.perf_counter()
    with StopSignals() as signals:
        for name, make in sessions.items():
            gone = give_up(name, trials) if give_up else lambda nats: ""
            left = None if limits is None else max(limits[name] - (time.perf_counter() - started), 0.0)
            with progress_bar(total=len(ids), desc=f"{name:<{width}}", unit=" tokens") as bar:

                def show(done: int, mean: float, bar: tqdm.tqdm = bar) -> None:
                    bar.set_postfix_str(f"perplexity {np.exp(mean):.4g}", refresh=False)
                    bar.update(done - bar.n)

                def stop(nats: np.ndarray, gone: Callable[[np.ndarray], str] = gone) -> str:
                    return "interrupted" if signals.received else gone(nats)

                trials.append(run_trial(name, make(), ids, seconds=left, progress=show, stop=stop))
            if signals.received:
                break
    return trials, signals.received or 0


def table(trials: Sequence[Trial], borders: Sequence[int], bytes_per_token: float) -> str:
    """The runs as text: perplexity a token and bits a byte between borders, memory and speed.

    `holds` is keys and values in use at the run's end, `process` what the process had in RAM then.

    Args:
      trials: the runs.
      borders: places in the text where columns end; the text's end is one more.
      bytes_per_token: of the text.
    """
    end = max(len(trial.nats) for trial in trials)
    edges = [0, *(border for border in borders if border < end), end]
    spans = list(itertools.pairwise(edges))
    head = ["cache", *(_span(*span, last=span[1] == end) for span in spans), "holds", "process", "tokens/s", ""]
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
        resident = human_bytes(trial.resident_bytes)
        rows.append([trial.name, *cells, held, resident, f"{trial.tokens_per_second:,.0f}", trial.ended])
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


class Collapse:
    """Says when a run has lost its way, chunk by chunk: its perplexity is so many times another run's, lately.

    Args:
      stable: what each token cost the other run, nats.
      times: how many times its perplexity is too much, over the newest 1,024 tokens.
      trained: nothing is said of the first so many tokens.
    """

    def __init__(self, stable: Float[np.ndarray, " N"], times: float, trained: int):
        self._stable, self._nats = stable, np.zeros(0, np.float32)
        self._times, self._trained = times, trained

    def __call__(self, nats: Float[np.ndarray, " C"]) -> str:
        self._nats = np.concatenate([self._nats, nats])
        end = len(self._nats)
        start = max(end - _RECENT, self._trained)
        if end - start < _RECENT // 2 or end > len(self._stable):
            return ""
        times = np.exp(self._nats[start:].mean() - self._stable[start:end].mean())
        return f"{times:.2g} times the perplexity" if times > self._times else ""


def verdict(trials: Sequence[Trial], trained: int, window: int, promised: float = 0) -> list[str]:
    """What the numbers of a dense cache, a window, and sinks with a window say, in words.

    Args:
      trials: the runs, by their names; what cannot be said without one that is missing is left out.
      trained: the model's training length.
      window: tokens that the small caches hold.
      promised: training lengths that the last was meant to read.
    """
    found = {trial.name: trial for trial in trials}
    if SINKS not in found:
        return []
    sinks, lines = found[SINKS], []
    if dense := found.get(DENSE):
        lines += _about_dense(dense, sinks, trained)
    if (without := found.get(WINDOW)) and min(len(without.nats), len(sinks.nats)) > window:
        end = min(len(without.nats), len(sinks.nats))
        first, later = without.part(0, window).perplexity, without.part(window, end).perplexity
        stable = sinks.part(window, end).perplexity
        meaning = (
            f"{later / stable:.2g} times as much, for want of the first tokens, on which attention rests"
            if later > _APART * stable
            else "on this model the window does not collapse, it does without the first tokens"
        )
        lines.append(
            f"window: perplexity {first:.4g} while the first tokens are there, {later:.4g} once they have left, where "
            f"sinks + window has {stable:.4g}: {meaning}."
        )
    times = len(sinks.nats) / trained
    after = f", {sinks.part(trained).perplexity:.4g} after" if times > 1 else ""
    lines.append(
        f"sinks + window: {times:,.3g} times the training length in {human_bytes(sinks.memory.allocated)}; perplexity "
        f"{sinks.part(0, trained).perplexity:.4g} at first{after}."
    )
    if times < promised:
        lines.append(f"That is less than the {promised:,.3g} times that this is meant to show: it was cut short.")
    return lines


def _about_dense(dense: Trial, sinks: Trial, trained: int) -> list[str]:
    end = min(len(dense.nats), len(sinks.nats))
    lines = []
    if end > trained:
        start = max(end - _RECENT, trained)
        early, early_stable = dense.part(0, trained).perplexity, sinks.part(0, trained).perplexity
        past, stable = dense.part(start, end).perplexity, sinks.part(start, end).perplexity
        meaning = (
            "beyond its training length the model has lost its way"
            if past > _APART * stable
            else "the model copes with a longer context that far; memory is what ends it"
        )
        lines.append(
            f"dense: perplexity {early:.4g} up to token {trained:,}, where sinks + window has {early_stable:.4g}; "
            f"{past:.4g} from token {start:,} to {end:,}, where sinks + window has {stable:.4g}: {meaning}."
        )
    else:
        lines.append(f"dense: it got to token {end:,}, which is not beyond its training length.")
    if dense.ended:
        held, whole = dense.memory.in_use(end), sum(dense.memory.slot_bytes) * len(sinks.nats)
        lines.append(
            f"It was stopped ({dense.ended}) holding {human_bytes(held)}, {held / sinks.memory.allocated:.3g} times "
            f"what the others hold; all {len(sinks.nats):,} tokens would have taken {human_bytes(whole)}."
        )
    return lines
