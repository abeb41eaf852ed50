"""Why MiniCache costs a small model much: its rule written again in plain PyTorch, whole and in parts.

    python -m benchmarks.caches.real_model.merged_layers --model=FOLDER

`transformers` reads SmolLM2-135M-Instruct (30 layers, three key heads of 64 channels) in float32 over Python's own help
topics (`pydoc_data.topics`), the prompt in one pass; then the keys and values of neighbouring layers are merged in its
cache, and the text goes on. Nothing of streamjax takes part but the tokenizer, and the row `sj.compact`, which is its
own answer to the same question. `perplexity` is of the tokens behind the prompt.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import streamjax as sj
from benchmarks.reporting import report

Pair = tuple[torch.Tensor, torch.Tensor]
Merge = Callable[[torch.Tensor, torch.Tensor, float], Pair]


def angles(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Between the vectors of two layers, in radians, [B, K, T]."""
    cosine = torch.nn.functional.cosine_similarity(low, high, dim=-1)
    return torch.acos(cosine.clamp(-1, 1))


def on_the_sphere(low: torch.Tensor, high: torch.Tensor, toward: float) -> Pair:
    """One direction and two lengths."""
    lengths = [x.norm(dim=-1, keepdim=True) for x in (low, high)]
    angle = angles(low, high)[..., None]
    sine = torch.sin(angle).clamp(min=1e-6)
    parts = torch.sin((1 - toward) * angle) / sine, torch.sin(toward * angle) / sine
    direction = parts[0] * low / lengths[0] + parts[1] * high / lengths[1]
    return direction * lengths[0], direction * lengths[1]


def mean(low: torch.Tensor, high: torch.Tensor, toward: float) -> Pair:
    """One vector for both."""
    both = (1 - toward) * low + toward * high
    return both, both


def heads_together(merge: Merge) -> Merge:
    """The same of vectors of all heads together."""

    def merged(low: torch.Tensor, high: torch.Tensor, toward: float) -> Pair:
        wide = (x.transpose(1, 2).flatten(2)[:, None] for x in (low, high))
        found = (x[:, 0].unflatten(2, low.shape[1::2]).transpose(1, 2) for x in merge(*wide, toward))
        return next(found), next(found)

    return merged


def merged_cache(
    held: Sequence[Pair],
    pairs: Sequence[tuple[int, int]],
    merge: Merge = on_the_sphere,
    toward: float = 0.6,
    apart: float = 0.05,
    parts: str = "kv",
) -> DynamicCache:
    """A cache with keys and values [B, K, T, D] of pairs of layers merged, a share `apart` of each head's tokens aside.

    The tokens with the largest angle stay, of keys or of values. `parts`: "k", "v" or "kv", which of both are merged.
    """
    layers = list(held)
    for i, j in pairs:
        angle = torch.maximum(*(angles(low, high) for low, high in zip(held[i], held[j], strict=True)))
        stays = torch.zeros_like(angle, dtype=torch.bool)
        count = round(apart * angle.shape[-1])
        if count:
            stays.scatter_(-1, angle.topk(count).indices, True)
        new = [list(held[i]), list(held[j])]
        for part in range(2):
            if "kv"[part] in parts:
                for layer, old, made in zip(
                    new, (held[i], held[j]), merge(held[i][part], held[j][part], toward), strict=True
                ):
                    layer[part] = torch.where(stays[..., None], old[part], made)
        layers[i], layers[j] = map(tuple, new)
    cache = DynamicCache()
    for i, (k, v) in enumerate(layers):
        cache.update(k, v, i)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--behind", type=int, default=256, help="tokens that follow")
    parser.add_argument("--pairs", action="store_true", help="each pair of layers by itself too, and its angles")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    peer = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    text = sj.load_tokenizer(arguments.model).encode("\n".join(topics.values()))
    ids = np.array([text[: arguments.tokens + arguments.behind]])
    prompt, rest = ids[:, : arguments.tokens], ids[:, arguments.tokens :]
    with torch.no_grad():
        read = peer(torch.tensor(prompt), use_cache=True)
    held = [(layer.keys, layer.values) for layer in read.past_key_values.layers]
    rows = []

    def tell(rule: str, perplexity: float, angle: tuple[float, float] | None = None) -> None:
        rows.append({"merged": rule, "perplexity": perplexity})
        if angle is not None:
            rows[-1] |= {"keys, degrees": math.degrees(angle[0]), "values, degrees": math.degrees(angle[1])}
        print(rows[-1], flush=True)

    def asked(cache: DynamicCache) -> float:
        with torch.no_grad():
            logits = peer(torch.tensor(rest), past_key_values=cache, use_cache=True).logits
        said = torch.cat((read.logits[:, -1:], logits[:, :-1]), dim=1)[0].double()
        return math.exp(torch.nn.functional.cross_entropy(said, torch.tensor(rest[0])))

    count = len(held)
    upper = [(i, i + 1) for i in range(count // 2, count - 1, 2)]
    lower = [(i, i + 1) for i in range(0, count // 2 - 1, 2)]
    tell("nothing", asked(merged_cache(held, [])))
    tell("MiniCache: layers 15 to 28 in pairs, 5% of the tokens apart", asked(merged_cache(held, upper)))
    tell("the same by sj.compact", _ours(arguments.model, prompt, rest))
    for name, pairs, options in (
        ("keys alone", upper, {"parts": "k"}),
        ("values alone", upper, {"parts": "v"}),
        ("a mean, with no lengths of their own", upper, {"merge": mean}),
        ("directions of all heads together", upper, {"merge": heads_together(on_the_sphere)}),
        ("halfway between the layers", upper, {"toward": 0.5}),
        ("no tokens apart", upper, {"apart": 0.0}),
        ("20% of the tokens apart", upper, {"apart": 0.2}),
        ("50% of the tokens apart", upper, {"apart": 0.5}),
        ("layers 0 to 13 in pairs instead", lower, {}),
    ):
        tell(name, asked(merged_cache(held, pairs, **options)))
    for i, j in upper if arguments.pairs else ():
        angle = tuple(float(angles(held[i][part], held[j][part]).mean()) for part in range(2))
        tell(f"layers {i} and {j} alone", asked(merged_cache(held, [(i, j)])), angle)
    report(
        "caches/real_model/merged_layers", rows, arguments.output, tokens=arguments.tokens, behind=arguments.behind,
        torch=torch.__version__, transformers=transformers.__version__,
    )  # fmt: skip


def _ours(folder: str, prompt: np.ndarray, rest: np.ndarray) -> float:
    model = sj.load(folder, dtype="float32")
    state = sj.init_state(model, sj.kv.preset("dense", capacity=prompt.shape[1] + rest.shape[1]))
    state = sj.compact(model, sj.read(model, state, prompt, 256), sj.kv.preset("minicache", room=rest.shape[1]))
    return math.exp(np.asarray(sj.score(model, state, rest, 256)[1]).mean(dtype=np.float64))


if __name__ == "__main__":
    main()
