"""Chunked backprop of every architecture that the library loads, against the whole sequence at once."""

import pytest

from streamjax.models.families import FAMILIES, read_config
from tests.architectures import CASES, tiny_config
from tests.training.gradient_checks import ORDERS, check

# Layers of the kinds that another case has too: a window and grouped heads, norms behind, experts.
REPEATED = {"mistral": "qwen2", "phi3": "qwen2", "falcon-7b": "falcon-40b", "olmo3": "olmo2", "qwen3_moe": "qwen2_moe"}
REPEATED |= {"mixtral": "qwen2_moe", "deepseek_v2": "deepseek_v3", "gemma4": "gemma4-experts", "gemma3": "gemma2"}
REPEATED |= {"starcoder2": "qwen2", "exaone4": "olmo2", "cohere2": "falcon-40b", "glm4": "llama", "granite": "llama"}
REPEATED |= {
    "smollm3": "llama",
    "llama": "qwen2",
    "gemma4-experts": "gpt_oss",
    "ministral3": "llama4",
    "falcon-alibi": "mpt",
    "qwen3_5": "qwen3_next",
    "granitemoehybrid": "mamba2",
    "mamba2": "qwen3_next",
    "lfm2_moe": "lfm2",
    "qwen3_5_moe": "qwen3_next",
    "olmo_hybrid": "qwen3_next",
    "nemotron_h": "mamba2",
    "qwen2_moe": "qwen3_next",
    "qwen2": "gemma2",
    "gpt_neox": "falcon-40b",
    "nemotron_h-experts": "deepseek_v3",
    "gla": "qwen3_next",
    "rwkv7": "qwen3_next",  # its layers: tests/models/mixers/test_linear_mixers.py and test_handed_on.py
    "qwen3": "qwen3_next",
    "kimi_linear": "qwen3_next",
    "falcon_h1": "qwen3_next",
    "gpt_oss": "qwen3_next",  # its sinks: test_sink_logits.py
    "falcon-40b": "mpt",
    "olmo2": "gemma2",
    "recurrent_gemma": "qwen3_next",  # states that chunks hand on, before a layer with attention
    "lfm2": "qwen3_next",  # a convolution that begins in the chunk before
    "llama4": "deepseek_v3",  # its attention within chunks: test_chunked.py
    "gemma4-shared": "gemma2",  # with fewer layers in the test below, as deepseek_v3
    "deepseek_v3": "qwen3_next",
}


# With fewer layers: the second takes the keys of the first; one layer with latent attention and experts.
FEWER = {
    "gemma4-shared": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1},
    "deepseek_v3": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
}


def test_every_family_has_a_case():
    assert {case.split("-")[0] for case in CASES} == set(FAMILIES)


def of_every_case():
    """Both orders of every case; one of them is slow, by turns, and so is what repeats another case or test."""
    return [
        pytest.param(case, order, marks=pytest.mark.slow if case in REPEATED or index // 2 % 2 != turn else ())
        for index, case in enumerate(CASES)
        for turn, order in enumerate(ORDERS)
    ]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("case", "kind", "order"), [("gemma4-shared", "gemma4_text", "chunk"), ("deepseek_v3", "deepseek_v3", "layer")]
)
def test_gives_the_gradient_of_fewer_layers(case, kind, order):
    config = read_config({**CASES[case], **FEWER[case], "model_type": kind})
    assert len(config.blocks) == FEWER[case]["num_hidden_layers"]
    kept = {"keep_attention": True, "offload": "host", "offload_fraction": 0.4} if order == "layer" else {}
    check(config, 19, chunk_size=6, packed=True, orders=(order,), **kept)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("case", "order"), of_every_case())
def test_gives_the_gradient(case, order):
    """In chunks that do not divide the sequence; half of the cases in packed rows, and with stacked layers.

    In half of those that the layer order is asked, it keeps what attention found.
    """
    index = list(CASES).index(case)
    odd, kept = index % 2 == 1, order == "layer" and index % 4 in (1, 2)
    check(tiny_config(case), 19, chunk_size=6, packed=odd, stacked=odd, orders=(order,), keep_attention=kept)
