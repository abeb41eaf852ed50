"""What examples in docstrings may use without making it: a tiny model, its tokenizer, a prompt, a stream, and files.

An example reads as if `model` were any model. Here it has two narrow layers and drawn weights, and the folder
`SmolLM2-135M` holds it. What is trained beside a model (draft heads, a side network) lies in files of numbers that
were drawn, too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from streamjax.models.side_network import SideConfig, SideDecoder, SideNetwork
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.side_networks import save_side_network
from streamjax.streaming.speculative.heads.hydra_file import HydraHeads
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from tests.streaming.tiny_models import GQA, build

PROMPT = "Once upon a time"
CAPACITY = 128  # of the stream; programs depend on it


@functools.cache
def shared_names() -> dict[str, Any]:
    """Names whose values no example changes."""
    tokenizer = sj.load_tokenizer()
    return {
        "jax": jax,
        "jnp": jnp,
        "np": np,
        "sj": sj,
        "model": build(GQA.replace(vocab_size=259)),
        "tokenizer": tokenizer,
        "prompt": np.array([tokenizer.encode(PROMPT)], np.int32),  # [1, 16]
        "greedy": sj.Sampler(temperature=0),
    }


def example_names() -> dict[str, Any]:
    """Those, and a stream at its start, which an example may use up."""
    shared = shared_names()
    return {**shared, "state": sj.init_state(shared["model"], sj.kv.preset("dense", capacity=CAPACITY))}


def write_example_files(folder: Path) -> None:
    """The files that examples read."""
    model = shared_names()["model"]
    draw, width, ids = np.random.default_rng(0), model.config.d_model, np.arange(16, dtype=np.int32)
    owner = fingerprint_in_any_dtype(model)

    def drawn(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    sj.save_hf(model, folder / "SmolLM2-135M")
    inward, outward = tuple(drawn((1 + i) * width, 8) for i in (1, 2)), (drawn(8, width), drawn(8, width))
    HydraHeads(inward, outward, ids, owner, tokens=1).save(folder / "heads.safetensors")
    PromptTokens(drawn(2, width), ids, owner, tokens=1).save(folder / "prompts.safetensors")
    side = SideNetwork.beginning(model, SideConfig.for_model(model.config))
    save_side_network(SideDecoder(model, side), folder / "side.safetensors", tokens=1)
