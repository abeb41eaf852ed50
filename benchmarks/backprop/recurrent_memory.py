"""Memory of one gradient step of recurrent models of 1.3B parameters, compiled ahead of time for one v5p.

    python -m benchmarks.backprop.recurrent_memory                          # half an hour on 2 quiet cores; no TPU
    python -m benchmarks.backprop.recurrent_memory --models "Mamba-2 1.3B"

One sequence, bf16 parameters and gradients, layers stacked, with the chip's kernels: Mamba-2's shape, and Qwen3-Next's
with dense MLPs (Gated DeltaNet in three of four layers). `full-logits` is gradient checkpointing a layer, with the
logits of the whole sequence; `chunk` is `loss_and_grad` in chunks of 4,096 tokens, which keeps states at the chunks'
borders, and the keys of the layers that attend. Peaks are the compiler's, which is ended once every buffer has its
place; bytes a token are their slope between 16,384 and 32,768 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from benchmarks.backprop.compile_case import FULL_LOGITS, Case, compile_case
from benchmarks.reporting import RESULTS, report
from streamjax.models.families import read_config

MODELS: Mapping[str, Mapping[str, Any]] = {
    "Mamba-2 1.3B": {
        "model_type": "mamba2",
        "vocab_size": 50288,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_heads": 64,
        "head_dim": 64,
        "n_groups": 1,
        "state_size": 128,
        "tie_word_embeddings": True,
    },
    "Qwen3-Next-like 1.4B": {
        "model_type": "qwen3_5_text",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 4,
        "tie_word_embeddings": True,
    },
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "full-logits": FULL_LOGITS,
    "chunk": {"method": "chunk", "chunk_size": 4096, "grad_dtype": "bfloat16", "kv_grad_dtype": "bfloat16"},
}
NAME = "backprop/recurrent_memory"
CHIP, SHORT, LONG = "v5p:2x2x1", 16384, 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="the others' figures stay")
    models, path = parser.parse_args().models, RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows, slopes = [row for row in known if row["model"] not in models], dict[str, float]()
    for model in models:
        config = read_config(MODELS[model])
        for method, arguments in METHODS.items():
            peaks = {
                length: compile_case(Case(config, CHIP, length, arguments, kernels=True), until_assigned=True)["peak"]
                for length in (SHORT, LONG)
            }
            slopes[method] = (peaks[LONG] - peaks[SHORT]) / (LONG - SHORT)
            rows.append(
                {
                    "model": model,
                    "parameters": config.parameter_count,
                    "method": method,
                    "GB at 32,768": round(peaks[LONG] / 1e9, 2),
                    "bytes a token": round(slopes[method]),
                    "full-logits / this": round(slopes["full-logits"] / slopes[method], 1),
                }
            )
            print(rows[-1], flush=True)
    report(NAME, rows)


if __name__ == "__main__":
    main()
