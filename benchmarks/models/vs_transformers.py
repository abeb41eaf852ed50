"""Decode and prefill, tokens a second, against `transformers` on torch CPU with the same weights.

    python -m benchmarks.models.decode_vs_transformers    # about 10M and 100M parameters; some 4 minutes on 2 cores

Both sides run float32 greedy decoding of one stream with 1,024 cached tokens (`transformers`: its dynamic cache and
sdpa attention; streamjax: `sj.generate` over a streaming_llm cache of 4 + 1,020) and prefill of 1,024 tokens. Turns
alternate in one process; the ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

import jax
import numpy as np
import torch
import transformers

import streamjax as sj
from benchmarks.reporting import interleaved, median_ratio, report
from streamjax.models.files.hugging_face import load_hf

SIZES = {
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
CACHED, NEW = 1024, 16


def pair(size: str) -> tuple[transformers.PreTrainedModel, sj.Decoder, int]:
    """The same random Llama in both libraries, and its parameter count."""
    vocab = 8192 if size == "10M" else 32000
    config = transformers.LlamaConfig(
        vocab_size=vocab, max_position_embeddings=4096, tie_word_embeddings=True, attn_implementation="sdpa",
        **SIZES[size],
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model = load_hf(folder)
    return peer, model, sum(p.numel() for p in peer.parameters())


class Torch:
    """`transformers`, decoding greedily from a filled cache."""

    def __init__(self, model: transformers.PreTrainedModel, prompt: np.ndarray):
        self.model, self.prompt = model, torch.tensor(prompt)
        self.prefill()

    @torch.inference_mode()
    def prefill(self) -> None:
        output = self.model(self.prompt, use_cache=True, logits_to_keep=1)
        self.cache, self.token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def decode(self) -> None:
        for _ in range(NEW):
            output = self.model(self.token, past_key_values=self.cache, use_cache=True)
            self.token = output.logits[:, -1:].argmax(-1)
            self.token.item()
        self.cache.crop(-NEW)  # so that every turn reads the same number of cached tokens


class Ours:
    """streamjax, decoding greedily from a full endless cache."""

    def __init__(self, model: sj.Decoder, prompt: np.ndarray):
        self.model, self.prompt = model, prompt
        self.cache = sj.kv.preset("streaming_llm", sinks=4, window=CACHED - 4)
        self.prefill()

    def prefill(self) -> None:
        state = sj.init_state(self.model, self.cache)
        self.state = jax.block_until_ready(sj.read(self.model, state, self.prompt, chunk_size=CACHED))

    def decode(self) -> None:
        empty = np.zeros((1, 0), np.int32)
        self.state, tokens = sj.generate(
            self.model, self.state, empty, max_new_tokens=NEW, sampler=sj.Sampler(temperature=0)
        )
        jax.block_until_ready(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=9, help="turns; the median counts")
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        peer, model, parameters = pair(size)
        prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, CACHED)).astype(np.int32)
        torch_side, our_side = Torch(peer, prompt), Ours(model, prompt)
        for phase, tokens in (("decode", NEW), ("prefill", CACHED)):
            seconds = interleaved(
                {"torch": getattr(torch_side, phase), "streamjax": getattr(our_side, phase)}, arguments.repeats
            )
            rows.append(
                {
                    "parameters": f"{parameters / 1e6:.1f}M",
                    "phase": phase,
                    "transformers tok/s": tokens / statistics.median(seconds["torch"]),
                    "streamjax tok/s": tokens / statistics.median(seconds["streamjax"]),
                    "ratio": median_ratio(seconds["torch"], seconds["streamjax"]),
                }
            )
    report(
        "models/decode_vs_transformers", rows, torch=torch.__version__, transformers=transformers.__version__,
        torch_threads=torch.get_num_threads(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
