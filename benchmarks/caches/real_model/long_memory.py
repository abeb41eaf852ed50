"""A side network that recalls what left the window (LongMem), beside the frozen model that it was trained with.

    python -m benchmarks.caches.real_model.long_memory

`models/stdlib_byte` (4 layers, trained on 512 bytes) stays as it is. Two side networks of two layers learn beside it,
from the same bytes of the built-in corpus's training split in the same order: one with a bank of what left the windows,
the other without. Then all read held-out documents of the corpus, one behind the other. `bits` are a byte's, behind the
first --skip bytes; `far` are those of bytes in which a run of at least 12 bytes ends that stood before, but not in the
last 508 bytes: what only a memory can know. Every cache has 4 sinks and a window of 508 in each layer.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.data.stdlib_corpus import split_of, stdlib_documents
from streamjax.kv.cascade import Cascade
from streamjax.models.side_network import SideConfig, SideDecoder
from streamjax.streaming.side_networks import save_side_network
from streamjax.training.heads.side_network import SideTraining, stretches_of, train_side_network

MODEL = Path(__file__).parents[3] / "models" / "stdlib_byte"
SINKS, WINDOW, RUN = 4, 508, 12


def text_of(split: str, most: int) -> np.ndarray:
    """The bytes of a split's documents, one behind the other."""
    whole, found = bytearray(), 0
    for name, text in stdlib_documents():
        if split_of(name) == split and found < most:
            whole += text.encode()
            found = len(whole)
    return np.frombuffer(bytes(whole[:most]), np.uint8).astype(np.int32)


def known_from_afar(ids: np.ndarray) -> np.ndarray:
    """Which bytes end a run of `RUN` that has stood before, but not within the window."""
    last: dict[bytes, int] = {}
    text, far = bytes(ids.astype(np.uint8)), np.zeros(len(ids), bool)
    for i in range(RUN - 1, len(ids)):
        run = text[i - RUN + 1 : i + 1]
        before = last.get(run)
        far[i] = before is not None and i - before > SINKS + WINDOW
        last[run] = i
    return far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of AdamW, each over a stretch of every stream")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--stretch", type=int, default=256, help="bytes of a stream in a step")
    parser.add_argument("--capacity", type=int, default=16384, help="bytes in the bank")
    parser.add_argument("--held_out", type=int, default=65536, help="bytes that are read")
    parser.add_argument("--skip", type=int, default=8192, help="of these that are not counted")
    parser.add_argument("--learning_rate", type=float, default=SideTraining.learning_rate)
    parser.add_argument("--scale", type=float, default=SideTraining.scale)
    parser.add_argument("--save", type=Path, help="where the side network goes")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = sj.load(MODEL)
    bank = sj.kv.preset("long_mem", sinks=SINKS, window=WINDOW, capacity=given.capacity, page=8, top_k=16)
    local = sj.kv.preset("streaming_llm", sinks=SINKS, window=WINDOW)
    held_out = text_of("test", given.held_out)
    far = known_from_afar(held_out)
    far[: given.skip] = False
    rows = []

    def tell(name: str, model: sj.Decoder, cache: Cascade, trained: float | None = None) -> None:
        start = time.process_time()
        _, nats = sj.score(model, sj.init_state(model, cache), [held_out.tolist()], 256)
        bits = np.asarray(nats[0], np.float64) / math.log(2)
        row = {"reads": name, "bits": bits[given.skip :].mean(), "far": bits[far].mean()}
        row |= {"trained, CPU s": trained, "read, CPU s": time.process_time() - start}
        rows.append(row)
        print(row, flush=True)

    tell("the model, sinks and a window", model, local)
    config = SideTraining(given.steps, given.learning_rate, scale=given.scale)
    side = SideConfig.for_model(model.config)
    for name, cache in (("with a bank", bank), ("without a bank", local)):
        start, losses = time.process_time(), []
        whole = stretches_of(text_of("train", 1 << 22), given.streams, given.stretch)
        for step in train_side_network(model, side, cache, whole, config):
            losses.append(step.loss / math.log(2))
            if len(losses) % 20 == 0:
                print(f"{len(losses)} steps, {np.mean(losses[-20:]):.4f} bits", flush=True)
        trained: SideDecoder = step.model
        seconds = time.process_time() - start
        tell(f"side network trained {name}", trained, cache, seconds)
        if cache is bank:
            tell("the same, its bank taken away", trained, local, seconds)
            if given.save is not None:
                save_side_network(trained, given.save, given.steps * given.streams * given.stretch)
    numbers = {"far_bytes": int(far.sum()), "steps": given.steps, "streams": given.streams, "stretch": given.stretch}
    report("caches/real_model/long_memory", rows, given.output, **numbers, capacity=given.capacity)


if __name__ == "__main__":
    main()
