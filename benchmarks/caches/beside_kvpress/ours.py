"""Our half of `versus_kvpress`: contexts are read, compacted by each method, and asked about."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.caches.beside_kvpress.methods import FILTERS, LAZY_THRESHOLD, METHODS, Sizes
from streamjax.data.ruler import Turn, score
from streamjax.evaluation.context_states import compacted, wholly
from streamjax.kv.presets.registry import Built
from streamjax.streaming.by_layer.writing import write_layerwise

CLOCKS = {"times": time.process_time, "wall": time.perf_counter}
GREEDY = sj.Sampler(temperature=0)


def our_cache(request: dict[str, Any], name: str, share: float, context: int) -> Built:
    """The cache of a method for contexts of so many tokens."""
    sizes = Sizes(int(context * share), request["room"], share, request["longest"], request["filters"])
    return METHODS[name](sizes)


def before(name: str, cache: Built, longest: int, chunk: int) -> Built:
    """The cache that keeps everything until a method compacts it."""
    dense = name in ("dense", "simlayerkv", "think")
    return wholly(sj.kv.preset("dense", capacity=longest) if dense else cache, longest, chunk)


def measured_filters(model: str, work: Path, context: list[int]) -> str:
    """The file of a model's query filters, which this context gives where there is none."""
    path = work.absolute() / FILTERS
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        sj.measure_filters(sj.load(model), [context]).save(path)
    return str(path)


def laid_out(
    model: sj.Decoder, tokenizer: Any, state: Any, request: dict[str, Any], name: str, cache: Built,
    rows: list[dict[str, Any]], longest: int,
) -> Any:  # fmt: skip
    """The state after compaction; what has a window goes on where nothing is pushed out."""
    contexts, prompts = [row["context"] for row in rows], [row["prompt"] for row in rows]
    if name == "simlayerkv":
        last = np.array([context[-1:] for context in contexts])
        near = cache.tiers[0]  # sinks and a window in one
        state = sj.compact(
            model, state,
            sj.lazy_layers(model, state, last, threshold=LAZY_THRESHOLD, sinks=near.sinks, window=near.window),
        )  # fmt: skip
    elif name == "kvzip":
        width = min(map(len, contexts))
        again = np.array([context[len(context) - width :] for context in contexts])
        state = sj.compact(model, state, cache, queries=sj.reconstruction(again, request=request["repeat"]))
    else:
        state = compacted(model, tokenizer, state, cache, contexts, prompts)
    if name in ("streaming_llm", "simlayerkv"):
        state = sj.compact(model, state, sj.kv.preset("dense", capacity=longest))
    return state


def our_scores(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    path = arguments.work / "streamjax_scores.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    jobs = [("dense", 1.0), *((name, share) for name in request["methods"] for share in request["ratios"])]
    for task in arguments.tasks:
        numbers = [i for i, row in enumerate(request["examples"]) if row["task"] == task]
        rows = [request["examples"][i] for i in numbers]
        shortest, longest = min(len(row["context"]) for row in rows), request["longest"]
        read: dict[Any, Any] = {}  # states behind the contexts, by the cache that keeps everything

        def behind(whole: Built, some: list[dict[str, Any]], task: str = task, read: dict = read) -> Any:
            key = whole, tuple(map(id, some))
            if key not in read:
                contexts = [row["context"] for row in some]
                read[key] = sj.read(model, sj.init_state(model, whole, len(some)), contexts)
            return read[key]

        for name, share in jobs:
            key = name if name == "dense" else f"{name} {share}"
            if all(key in done.get(str(i), {}) for i in numbers):
                continue
            jax.clear_caches()  # no other method runs its programs, and a process has room for so many
            dense = sj.kv.preset("dense", capacity=longest)
            cache = dense if name == "dense" else our_cache(request, name, share, shortest)
            # which layers are lazy is one decision for all streams of a state
            for at in [[i] for i in range(len(rows))] if name == "simlayerkv" else [list(range(len(rows)))]:
                some = [rows[i] for i in at]
                state = behind(before(name, cache, longest, 512), some)
                if name == "dense":
                    state = jax.tree.map(jnp.copy, state)  # compact leaves what it is given, generate does not
                else:
                    state = laid_out(model, tokenizer, state, request, name, cache, some, longest)
                for i, ids in zip(at, answers(model, tokenizer, state, some), strict=True):
                    done.setdefault(str(numbers[i]), {})[key] = plain(tokenizer, ids)
            path.write_text(json.dumps(done))
            print(task, key, file=sys.stderr, flush=True)


def answers(model: sj.Decoder, tokenizer: Any, state: Any, rows: list[dict[str, Any]]) -> list[list[int]]:
    """Token by token and layer by layer: layers of equal sizes share one program, where `generate` has all of them in
    one for each method and share."""
    tokens, prompts = max(row["answer_tokens"] for row in rows), [row["prompt"] for row in rows]
    options = {"max_new_tokens": tokens, "stop_tokens": tokenizer.eos_ids, "enough": right(tokenizer, rows)}
    return write_layerwise(model, state, prompts, **options)[1]


def plain(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode([token for token in ids if token not in tokenizer.eos_ids])


def right(tokenizer: Any, rows: list[dict[str, Any]]) -> Callable[[int, list[int]], bool]:
    """Whether a row's text has all the answers, so that nothing behind it counts."""
    return lambda row, ids: score(asked(rows[row]), plain(tokenizer, ids)) == 1.0


def asked(row: dict[str, Any]) -> Turn:
    return Turn("", "", tuple(row["answers"]), row["answer_tokens"])


def our_choices(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    """Which places of the first context stay, by layer and head, at each share."""
    path = arguments.work / "streamjax_choices.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    row = request["examples"][0]
    states: dict[Any, Any] = {}
    heads = [block.mixer.num_kv_heads for block in model.config.blocks]
    for name in request["methods"]:
        for share in request["ratios"]:
            key = f"{name} {share}"
            if key in found or name == "think":  # which keeps every token
                continue
            cache = our_cache(request, name, share, len(row["context"]))
            whole = before(name, cache, request["longest"], 512)
            if whole not in states:
                states[whole] = sj.read(model, sj.init_state(model, whole), [row["context"]])
            state = laid_out(model, tokenizer, states[whole], request, name, cache, [row], request["longest"])
            layers = zip(state.caches, state.layers, heads, strict=True)
            found[key] = [places(kept, part, count) for kept, part, count in layers]
            path.write_text(json.dumps(found))
            print(key, file=sys.stderr, flush=True)


def places(cache: Any, layer: Any, heads: int) -> list[list[int]]:
    """What the tiers of a layer hold, by head."""
    held: list[list[int]] = [[] for _ in range(heads)]
    for tier, part in zip(cache.tiers, layer, strict=True):
        # a pool has one list of slots, and says whose each is
        stored = part.slots if isinstance(tier, sj.kv.Pooled) else tier.stored(part, None)
        position, valid = (np.asarray(x)[0] for x in (stored.position, stored.valid))
        for head, kept in enumerate(held):
            kept += position[head % len(position)][valid[head % len(valid)]].tolist()
    return [sorted(kept) for kept in held]


def our_programs(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    """Every method once, so that its programs are in the folder of compiled ones; no time is noted."""
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    for name in request["methods"]:
        print(name, one_turn(model, tokenizer, request, name, time.process_time), file=sys.stderr, flush=True)


def one_turn(
    model: sj.Decoder, tokenizer: Any, request: dict[str, Any], name: str, clock: Callable[[], float]
) -> float:
    """Seconds of a context that is read, compacted and answered about."""
    row = request["examples"][0]
    length = len(row["context"])
    cache = our_cache(request, name, request["ratios"][0], length)
    longest = request["longest"] + request["timed_tokens"]
    even = -(-length // -(-length // 512))  # chunks of one width, at most 512, that leave little to pad
    chunk = -(-even // 16) * 16
    whole = before(name, cache, longest, chunk)
    began = clock()
    state = sj.read(model, sj.init_state(model, whole), [row["context"]], chunk)
    state = laid_out(model, tokenizer, state, request, name, cache, [row], longest)
    _, said = sj.generate(model, state, [row["prompt"]], max_new_tokens=request["timed_tokens"], sampler=GREEDY)
    jax.block_until_ready(said)
    return clock() - began


def our_times(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    path = arguments.work / f"streamjax_{arguments.side}.json"
    clock = CLOCKS[arguments.side]
    done = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    for name in request["methods"]:
        if name in done:
            continue
        spent = [one_turn(model, tokenizer, request, name, clock) for _ in range(request["repeats"] + 1)]
        done[name] = statistics.median(spent[1:])
        path.write_text(json.dumps(done))
        print(name, done[name], file=sys.stderr, flush=True)
