"""Prefill and decode of recurrent models against `transformers` on torch CPU, each side in a process of its own.

    python -m benchmarks.models.recurrent_vs_transformers          # some 10 minutes on 2 quiet cores

Drawn weights of some 100M parameters in float32: Mamba-2, and Gated DeltaNet with an MLP in every layer (Qwen3.5's
layers, the fourth of each four attending). Prefill of 1,024 tokens, and greedy decoding behind them, as in
`benchmarks.models.vs_transformers`. A state cannot be cut back, so `transformers` decodes on from where it stands; its
states stay as large as they are, and the attention of four layers grows by 32 tokens a turn. Neither side has kernels
beyond what its framework has for CPUs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.models.drawn import write_drawn
from benchmarks.models.vs_transformers import NEW, SIDES, Phases, comparison, our_phases, prompt, timed
from benchmarks.reporting import in_turn, report

MODULE = "benchmarks.models.recurrent_vs_transformers"
MODELS: Mapping[str, Mapping[str, Any]] = {
    "Mamba-2": {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": 50288,
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "num_heads": 24,
        "head_dim": 64,
        "n_groups": 1,
        "state_size": 128,
        "tie_word_embeddings": True,
    },
    "Gated DeltaNet": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "vocab_size": 50288,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 128,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 4,
        "tie_word_embeddings": True,
    },
}


def torch_phases(folder: str) -> Phases:
    """`transformers`: a prefill, and decoding on from the cache that it filled."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(prompt(model.config.vocab_size), dtype=torch.long)
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    filled: dict[str, Any] = {}

    @torch.inference_mode()
    def prefill() -> None:
        output = model(tokens, use_cache=True, logits_to_keep=1)
        filled.update(cache=output[name], token=output.logits[:, -1:].argmax(-1))
        filled["token"].item()

    @torch.inference_mode()
    def decode() -> None:
        for _ in range(NEW):
            output = model(filled["token"], use_cache=True, **{name: filled["cache"]})
            filled.update(cache=output[name], token=output.logits[:, -1:].argmax(-1))
            filled["token"].item()

    return {"prefill": prefill, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side; the median counts")
    parser.add_argument("--turns", type=int, default=5, help="turns of a process, behind one that warms up")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, folder = arguments.child
        phases = torch_phases(folder) if side == "transformers" else our_phases(folder, "float32")
        print(json.dumps(timed(phases, arguments.turns)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: write_drawn(values, str(Path(temporary) / name)) for name, values in MODELS.items()}
        cases = {(name, side): (side, folders[name]) for name, side in itertools.product(MODELS, SIDES)}
        found = in_turn(MODULE, arguments.rounds, cases, "--turns", arguments.turns)
    kinds = itertools.product(MODELS, SIDES)
    sides = [({"model": name, "side": side}, (name, side), (name, SIDES[0])) for name, side in kinds]
    rows = comparison(found, sides, "transformers' time / this")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    report("models/recurrent_vs_transformers", rows, rounds=arguments.rounds, turns=arguments.turns, **versions)


if __name__ == "__main__":
    main()
