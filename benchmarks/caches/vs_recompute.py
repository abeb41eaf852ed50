"""Streaming decode against sliding-window recomputation: the speed claim of StreamingLLM (2309.17453, figure 10).

    python -m benchmarks.caches.vs_recompute          # 2 cores: some 3 minutes

The only other way to keep the quality of a window on a stream without end is to run the model again over the last L
tokens for every new token. Both sides are streamjax with the same weights: recomputation is one forward pass over L
tokens with logits for the last only; streaming is `sj.generate` with 4 sinks and a window of L - 4. Turns alternate in
one process; the ratio is the median over turns. The paper's best is 22.2 times, per token, on a GPU.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import numpy as np

import streamjax as sj
from benchmarks.reporting import interleaved, median_ratio, report

NEW = 16


@jax.jit
def last_logits(model: sj.Decoder, tokens: jax.Array) -> jax.Array:
    """Logits after the last of [1, L] tokens."""
    return model.logits(model.hidden(tokens)[:, -1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5, help="turns; the median counts")
    arguments = parser.parse_args()
    config = sj.UniformConfig(
        vocab_size=8192, d_model=256, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=32, mlp_dim=704,
        tie_embeddings=True,
    )  # fmt: skip
    model = sj.Decoder(config, jax.random.key(0))
    rows = []
    for window in arguments.windows:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, window)).astype(np.int32)
        state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=4, window=window - 4))
        stream = [sj.read(model, state, tokens)]

        def streaming(stream: list = stream) -> None:
            empty = np.zeros((1, 0), np.int32)
            greedy = sj.Sampler(temperature=0)
            stream[0], new = sj.generate(model, stream[0], empty, max_new_tokens=NEW, sampler=greedy)
            jax.block_until_ready(new)

        def recompute(tokens: np.ndarray = tokens) -> None:
            jax.block_until_ready(last_logits(model, tokens))

        seconds = interleaved({"recompute": recompute, "streaming": streaming}, arguments.repeats)
        rows.append(
            {
                "window": window,
                "recompute ms/token": 1e3 * statistics.median(seconds["recompute"]),
                "streaming ms/token": 1e3 * statistics.median(seconds["streaming"]) / NEW,
                "ratio": NEW * median_ratio(seconds["recompute"], seconds["streaming"]),
            }
        )
    report("caches/vs_recompute", rows, parameters=config.parameter_count)


if __name__ == "__main__":
    main()
