"""Adapters on disk: what a folder means to PEFT, computed by transformers for every family; and what is refused.

To PEFT an adapter means `change_weights` below: a module by name, behind `base_model.model.`, and its weight changed by
`alpha / r * B @ A`, with the folder's r and alpha, or those that a pattern gives the module.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import streamjax as sj
from streamjax.models import UniformConfig, stack_layers
from streamjax.models.files.hugging_face import load_hf
from streamjax.models.lora.attaching import empty_adapters, places, ranks_of
from tests.architectures import tiny_config
from tests.covering import rest_slow
from tests.models import transformers_peers
from tests.models.families.peer_cases import CASES
from tests.streaming.tiny_models import build

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FUSED = {"phi3": ("qkv_proj", "gate_up_proj"), "gpt_neox": ("query_key_value",), "falcon-40b": ("query_key_value",)}
FUSED |= {"mpt": ("Wqkv",), "glm4-mqa-partial": ("gate_up_proj", "k_proj")}
FAMILIES = (
    "llama-gqa-biases",
    "mistral-window",
    "qwen2",
    "qwen2_moe-dense-no-biases",
    "qwen3",
    "gemma2",
    "gemma3",
    "falcon-7b",
    "falcon-rw",
    "olmo2",
    "cohere2-mqa-biases-untied",
    *FUSED,
)


def adapted(base, targets, rank=3, alpha=5.0):
    """`base` with adapters whose every factor is drawn."""
    return drawn(sj.add_lora(base, rank, alpha, targets, jax.random.key(0)))


def drawn(model):
    random = np.random.default_rng(0)

    def draw(node):
        if not isinstance(node, sj.LoRAParam):
            return node
        return node.replace(jnp.asarray(random.normal(scale=0.3, size=node.shape), node.dtype))

    return jax.tree.map(draw, model, is_leaf=lambda node: isinstance(node, sj.LoRAParam))


def change_weights(model, folder):
    """What PEFT computes with the adapters of a folder, written into the weights of a transformers model."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name in linear if any(f".{name}".endswith(f".{target}") for target in config["target_modules"])}
    assert {f"base_model.model.{name}.lora_{x}.weight" for name in wanted for x in "AB"} == set(tensors)

    def of(name, field, patterns):
        special = [value for key, value in config[patterns].items() if re.match(rf"(.*\.)?({key})$", name)]
        return special[0] if special else config[field]

    for name in wanted:
        a, b = (torch.tensor(tensors[f"base_model.model.{name}.lora_{x}.weight"]) for x in "AB")
        rank = of(name, "r", "rank_pattern")
        assert a.shape[0] == b.shape[1] == rank
        with torch.no_grad():
            model.get_submodule(name).weight += of(name, "lora_alpha", "alpha_pattern") / rank * (b @ a)
    return model


@pytest.mark.usual("llama-gqa-biases")
@pytest.mark.parametrize("case", rest_slow(FAMILIES, "llama-gqa-biases", "qwen2_moe-dense-no-biases", "phi3", "mpt"))
def test_the_folder_means_the_same_to_transformers(case, tmp_path):
    torch_model = transformers_peers.peer(CASES[case])
    tokens = transformers_peers.tokens_for(torch_model, 20)
    base = load_hf(transformers_peers.write(torch_model, tmp_path / "base"))
    unchanged = transformers_peers.logits_of(torch_model, tokens)
    whole = tuple(places(base.config.blocks[0]))
    for targets in (whole, ("k", "up", "o")):
        model = adapted(base, targets)
        sj.save_lora(model, tmp_path / "adapter", base="somebody/base")
        expected = transformers_peers.logits_of(
            change_weights(transformers_peers.reload(tmp_path / "base"), tmp_path / "adapter"), tokens
        )
        np.testing.assert_allclose(sj.forward(model, tokens), expected, atol=1e-4, rtol=0)
        assert np.abs(expected - unchanged).max() > 0.1
        found = sj.load_lora(base, tmp_path / "adapter")
        jax.tree.map(np.testing.assert_array_equal, found, model)
        assert ranks_of(found) == ranks_of(model)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "somebody/base"
    sj.save_lora(stack_layers(model), tmp_path / "stacked")
    for name, tensor in load_file(tmp_path / "stacked" / WEIGHTS).items():
        np.testing.assert_array_equal(tensor, load_file(tmp_path / "adapter" / WEIGHTS)[name])
    jax.tree.map(
        np.testing.assert_array_equal, sj.load_lora(stack_layers(base), tmp_path / "adapter"), stack_layers(model)
    )


def test_adapters_of_a_block_that_is_two_layers_of_a_file(tmp_path):
    base = build(tiny_config("nemotron_h"))
    model = adapted(base, ("q", "up", "down"))
    sj.save_lora(model, tmp_path)
    modules = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in load_file(tmp_path / WEIGHTS)}
    places = "layers.1.mixer.q_proj", "layers.2.mixer.up_proj", "layers.2.mixer.down_proj"
    assert modules == {f"backbone.{place}" for place in places}
    jax.tree.map(np.testing.assert_array_equal, sj.load_lora(base, tmp_path), model)


@pytest.mark.parametrize("case", rest_slow(FUSED, "phi3", "falcon-40b"))
def test_an_adapter_that_peft_trained_on_a_module_of_several_projections(case, tmp_path):
    """One pair of factors for all of them, scaled by the root of the rank, in a file that tells nothing of parts."""
    torch_model = transformers_peers.peer(CASES[case])
    tokens = transformers_peers.tokens_for(torch_model, 20)
    base = load_hf(transformers_peers.write(torch_model, tmp_path / "base"))
    random, tensors = np.random.default_rng(0), {}
    for name, module in torch_model.named_modules():
        if name.endswith(FUSED[case]):
            for factor, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                drawn = random.normal(scale=0.3, size=shape).astype(np.float32)
                tensors[f"base_model.model.{name}.lora_{factor}.weight"] = drawn
    save_file(tensors, tmp_path / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "bias": "none",
    }
    config |= {"target_modules": list(FUSED[case]), "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = sj.load_lora(base, tmp_path)
    targets = {"phi3": ("q", "k", "v", "gate", "up"), "glm4-mqa-partial": ("k", "gate", "up")}.get(
        case, ("q", "k", "v")
    )
    assert ranks_of(model) == {target: (4, 6.0) for target in targets}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 6}))  # what rsLoRA makes of 3, in plain LoRA
    expected = transformers_peers.logits_of(
        change_weights(transformers_peers.reload(tmp_path / "base"), tmp_path), tokens
    )
    np.testing.assert_allclose(sj.forward(model, tokens), expected, atol=1e-4, rtol=0)


def test_parts_of_a_module_with_ranks_and_alphas_of_their_own(tmp_path):
    torch_model = transformers_peers.peer(CASES["gpt_neox"]())
    tokens = transformers_peers.tokens_for(torch_model, 20)
    base = load_hf(transformers_peers.write(torch_model, tmp_path / "base"))
    model = drawn(empty_adapters(base, {"q": (2, 4.0), "v": (3, 9.0), "o": (4, 2.0)}))
    sj.save_lora(model, tmp_path / "adapter")
    expected = transformers_peers.logits_of(
        change_weights(transformers_peers.reload(tmp_path / "base"), tmp_path / "adapter"), tokens
    )
    np.testing.assert_allclose(sj.forward(model, tokens), expected, atol=1e-4, rtol=0)
    found = sj.load_lora(base, tmp_path / "adapter")
    assert ranks_of(found) == {"q": (2, 4.0), "v": (3, 6.0), "o": (4, 2.0)}  # one alpha / rank for a module, 2 here
    np.testing.assert_allclose(sj.forward(found, tokens), expected, atol=1e-4, rtol=0)


@pytest.fixture
def folder(tmp_path):
    """A llama, and the folder of its adapters on q and down."""
    base = load_hf(transformers_peers.write(transformers_peers.peer(CASES["llama-gqa-biases"]()), tmp_path / "base"))
    sj.save_lora(adapted(base, ("q", "down")), tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_ranks_and_alphas_by_patterns(folder):
    base, path = folder
    (path / "checksums.json").unlink()
    patterns = {"rank_pattern": {"q_proj": 3, "mlp.down_proj": 3}, "alpha_pattern": {r"layers\.\d+\..*q_proj": 9}}
    transformers_peers.edit_json(path / CONFIG, r=8, lora_alpha=7, **patterns)
    assert ranks_of(sj.load_lora(base, path)) == {"q": (3, 9.0), "down": (3, 7.0)}


def resized(base, **sizes):
    """Another base."""
    return build(UniformConfig.from_model_config(base.config).replace(**sizes))


def test_what_is_refused(folder, tmp_path):
    base, path = folder
    (path / "checksums.json").unlink()
    weights, config = (path / WEIGHTS).read_bytes(), (path / CONFIG).read_text()
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"

    def refused(message, model=base):
        with pytest.raises(ValueError, match=message) as caught:
            sj.load_lora(model, path)
        assert "\n" not in str(caught.value)

    for changes, message in (
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'; only 'LORA' is read"),
        ({"use_dora": True}, "lora_magnitude_vector of model.layers.0.self_attn.q_proj is missing"),
        ({"use_qalora": True}, "field 'use_qalora' is True, which is not implemented"),
        ({"trainable_token_indices": [3]}, r"field 'trainable_token_indices' is \[3\], which is not implemented"),
        ({"bias": "some"}, "field 'bias' is 'some'; it must be 'none', 'all' or 'lora_only'"),
        ({"modules_to_save": 3}, "field 'modules_to_save' is 3; a list of str is expected"),
        ({"layers_to_transform": ["1"]}, r"field 'layers_to_transform' is \['1'\]; a list of int is expected"),
        ({"r": 2.5}, "the rank of model.layers.0.self_attn.q_proj is 2.5: a whole number is needed"),
        ({"rank_pattern": {"(((": 3}}, r"field 'rank_pattern': the pattern '\(\(\(' cannot be used: a bracket is not"),
        ({"rank_pattern": {r"(([a-z0-9_.])*)*X": 3}}, "field 'rank_pattern': .* a repetition within a repetition"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base model too: convert it"),
        ({"r": None}, "field 'r' has None for model.layers.0.self_attn.q_proj: a positive number is needed"),
        ({"r": 4}, r"q_proj.lora_A.weight' has shape \[3, 48\]; .* ask for \[4, 48\]"),
    ):
        transformers_peers.edit_json(path / CONFIG, **changes)
        refused(message)
        (path / CONFIG).write_text(config)

    tensors = load_file(path / WEIGHTS)
    save_file({key: value for key, value in tensors.items() if key != name}, path / WEIGHTS)
    refused("lora_B of model.layers.1.mlp.down_proj is missing: a file that was cut, or another base")
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": tensors[name]}, path / WEIGHTS)
    refused("'base_model.model.lm_head.lora_A.weight' has shape .* ask for")
    save_file(tensors | {"base_model.model.vision.lora_A.weight": tensors[name]}, path / WEIGHTS)
    refused("'base_model.model.vision.lora_A.weight' has no place in this llama model: another base")
    save_file(tensors | {"base_model.model.model.layers.0.self_attn.q_proj.lora_C": tensors[name]}, path / WEIGHTS)
    refused("q_proj.lora_C' is no part of a LoRA adapter")
    save_file(tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": tensors[name]}, path / WEIGHTS)
    refused("lora_embedding_A' has shape .* ask for")
    save_file({}, path / WEIGHTS)
    refused("there are no adapters in it")
    (path / WEIGHTS).write_bytes(weights[:-7])
    refused("damaged or truncated")
    (path / WEIGHTS).unlink()
    refused(r"adapter_model.safetensors: this file is missing; adapters in pickle files \(\*.bin\) are not read")
    (path / WEIGHTS).write_bytes(weights)

    refused(r"down_proj.lora_A.weight' has shape \[3, 56\]; .* ask for \[3, 64\]", resized(base, mlp_dim=64))
    refused(
        "lora_A of model.layers.2.self_attn.q_proj is missing: adapter_config.json says that it has an adapter",
        resized(base, num_layers=3),
    )
    refused(r"layers.1.* has no place in this llama model: another base\?", resized(base, num_layers=1))
    refused(r"has no place in this gpt_neox model: another base\?", resized(base, family="gpt_neox", gated_mlp=False))
    refused("the model has LoRA adapters: merge_lora", sj.load_lora(base, path))
    with pytest.raises(ValueError, match="the model has no LoRA adapters: add_lora makes them"):
        sj.save_lora(base, tmp_path / "none")
    with pytest.raises(ValueError, match=r"nothing/adapter_config.json: this file is missing"):
        sj.load_lora(base, tmp_path / "nothing")
