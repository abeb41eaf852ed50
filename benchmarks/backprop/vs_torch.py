"""Time and memory of one gradient step against torch with the same weights, each in a process of its own.

    python -m benchmarks.backprop.vs_torch                         # 8,192 tokens; a quarter of an hour on 2 cores
    python -m benchmarks.backprop.vs_torch --length 2048 --repeats 5

A random Qwen2 of 55 million parameters in float32 and one sequence of random tokens. In torch: gradient checkpointing
by `transformers` (sdpa attention, all logits at once), and the order of StreamBP (2506.03077) written out in
`torch_peers.py`; with --paper also the authors' own code. Here: `layer` and `chunk`. Chunks are of 1,024 tokens, and
the logits of 512 tokens exist at once.

The processes take turns and wait in between; figures are medians over turns, and ratios are of seconds in the same
turn. `peak` is the largest resident memory of the process during a step, `step` how much that is above what it held
before (weights, libraries). Loss and gradient norm say that all compute the same; the authors' code takes labels where
the others take targets, and leaves each row's last token out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reporting import median_ratio, report

ROOT = Path(__file__).resolve().parents[2]
PAPER = "paper's code"
SIDES = ("torch checkpointing", "torch StreamBP", "streamjax layer", "streamjax chunk")
CHUNK, LOGITS = 1024, 512
Step = Callable[[], tuple[float, Sequence[np.ndarray]]]  # the loss, and the gradient's arrays


def random_tokens(length: int, vocab_size: int) -> np.ndarray:
    """[1, length + 1] tokens."""
    return np.random.default_rng(0).integers(0, vocab_size, (1, length + 1))


def write_model(folder: str) -> int:
    """Write a random model in Hugging Face's layout; its parameter count."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=65536, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def torch_step(side: str, folder: str, length: int) -> Step:
    """A step of one of the two sides in torch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="sdpa"
    )
    data = torch.from_numpy(random_tokens(length, model.config.vocab_size))
    tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    if side == PAPER:
        compute = paper_code(model)
    else:
        from benchmarks.backprop.torch_peers import StreamBP, checkpointed

        compute = partial(checkpointed, model) if side == "torch checkpointing" else StreamBP(model, CHUNK, LOGITS)

    def step() -> tuple[float, Sequence[np.ndarray]]:
        loss = float(compute(tokens, targets))
        gradient = [parameter.grad.numpy() for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        return loss, gradient

    return step


def paper_code(model: Any) -> Callable[[Any, Any], Any]:
    """A step by https://github.com/Ledzy/StreamBP, which makes targets of labels by itself."""
    import torch
    from streambp.stream_model import StreamModel

    streamed = StreamModel(
        model.train(), gradient_accumulation_steps=1, logits_chunk_size=LOGITS, checkpoint_chunk_size=CHUNK
    )
    streamed.gradient_checkpointing_enable()

    def compute(tokens: Any, targets: Any) -> Any:
        mask = torch.ones_like(tokens)
        return streamed(
            input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False, return_dict=True
        ).loss  # fmt: skip

    return compute


def our_step(method: str, folder: str, length: int) -> Step:
    """A step of this library."""
    import jax
    import jax.numpy as jnp

    import streamjax as sj

    model = sj.load(folder, jnp.float32, scan_layers=True)
    data = random_tokens(length, model.config.vocab_size).astype(np.int32)
    weights = np.ones((1, length), np.float32)
    batch = jax.device_put({"tokens": data[:, :-1], "targets": data[:, 1:], "weights": weights})
    compute = jax.jit(partial(sj.training.loss_and_grad, method=method, chunk_size=CHUNK, logits_chunk=LOGITS))
    program = compute.lower(model, batch).compile()

    def step() -> tuple[float, Sequence[np.ndarray]]:
        loss, gradient = program(model, batch)
        return float(loss), [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]

    return step


def serve(side: str, folder: str, length: int) -> None:
    """Answer each line of standard input with a step's figures: seconds, loss, norm, and bytes of resident memory."""
    library, _, method = side.partition(" ")
    step = our_step(method, folder, length) if library == "streamjax" else torch_step(side, folder, length)
    print("ready", flush=True)
    for _ in sys.stdin:
        gc.collect()
        _return_free_memory()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        start, cpu = time.perf_counter(), time.process_time()
        loss, gradient = step()
        figures = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "loss": loss}
        figures |= {"before": before, "peak": _status("VmHWM")}
        figures["norm"] = math.sqrt(sum(np.einsum("i,i", x, x, dtype=np.float64) for x in map(np.ravel, gradient)))
        del gradient
        print(json.dumps(figures), flush=True)


def _return_free_memory() -> None:
    """Hand the system what the C library keeps in reserve: memory of compilers and of loading is no step's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


class Side:
    """A process that takes a step when asked."""

    def __init__(self, name: str, folder: str, length: int, python: str = sys.executable):
        command = [python, "-m", "benchmarks.backprop.vs_torch", "--child", name, folder, str(length)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns: list[dict[str, float]] = []
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args[4]}: it ended with status {self.process.wait()}")  # type: ignore[index]
        return line

    def step(self) -> None:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.turns.append(json.loads(self._line()))

    def series(self, key: str) -> list[float]:
        """A figure of all turns but the first, which warms up."""
        return [turn[key] for turn in self.turns[1:]]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def row(name: str, side: Side, baseline: Side) -> dict[str, Any]:
    """A line of the table."""
    peak = max(side.series("peak"))
    return {
        "side": name,
        "loss": side.turns[-1]["loss"],
        "gradient norm": side.turns[-1]["norm"],
        "seconds": statistics.median(side.series("seconds")),
        "CPU seconds": statistics.median(side.series("cpu")),
        "torch StreamBP's time / this": median_ratio(baseline.series("seconds"), side.series("seconds")),
        "peak GB": peak / 1e9,
        "step GB": (peak - side.turns[1]["before"]) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence")
    parser.add_argument("--repeats", type=int, default=3, help="turns, after one that warms up")
    parser.add_argument("--output", type=Path, help="where the JSON goes; benchmarks/results by default")
    parser.add_argument("--paper", metavar="PYTHON", help="a Python that can import the authors' package, streambp")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, folder, length = options.child
        serve(side, folder, int(length))
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(folder)
        sides = {name: Side(name, folder, options.length) for name in SIDES}
        if options.paper:
            sides[PAPER] = Side(PAPER, folder, options.length, options.paper)
        for turn in range(options.repeats + 1):
            for name, side in sides.items():
                side.step()
                print(f"turn {turn} of {options.repeats}: {name} {side.turns[-1]['seconds']:.1f} s", flush=True)
        rows = [row(name, side, sides["torch StreamBP"]) for name, side in sides.items()]
        for side in sides.values():
            side.close()
    report("backprop/vs_torch", rows, options.output, parameters=parameters, length=options.length)


if __name__ == "__main__":
    main()
