"""Every kind of LoRA folder that PEFT writes, held against what PEFT computes with it, written plainly.

`oracle` is that: each weight of the base, changed as the papers say (2106.09685, 2402.09353), in transformers' model.
"""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import streamjax as sj
from streamjax.models import stack_layers, unstack_layers
from streamjax.models.files.hugging_face import load_hf
from streamjax.models.lora.attaching import ranks_of
from tests.models import transformers_peers

LAYERS, VOCAB, WIDTH = 3, 64, 16
Q, V = ([f"model.layers.{i}.self_attn.{name}_proj" for i in range(LAYERS)] for name in "qv")
DOWN, GATE = ([f"model.layers.{i}.mlp.{name}_proj" for i in range(LAYERS)] for name in ("down", "gate"))
HEAD, EMBEDDING, NORM = "lm_head", "model.embed_tokens", "model.norm"


def config_of(tied):
    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        tied: transformers_peers.write(transformers_peers.peer(config_of(tied)), root / str(tied))
        for tied in (False, True)
    }


@pytest.fixture
def base(bases):
    return bases[False]


def drawn(*shape):
    return np.random.default_rng(sum(shape)).normal(scale=0.3, size=shape).astype(np.float32)


def weights_of(folder):
    return {
        name: tensor.detach().numpy().copy() for name, tensor in transformers_peers.reload(folder).named_parameters()
    }


def factors(folder, modules, rank=4):
    weights, found = weights_of(folder), {}
    for index, name in enumerate(modules):
        out, width = weights.get(f"{name}.weight", weights[f"{EMBEDDING}.weight"]).shape
        found[f"{name}.lora_A.weight"] = drawn(rank, width) + np.float32(0.01 * index)
        found[f"{name}.lora_B.weight"] = drawn(out, rank)
    return found


def write(folder, tensors, prefix="base_model.model.", **fields):
    folder.mkdir(exist_ok=True)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values | fields))
    return folder


def oracle(folder, tensors, scale=lambda name: 2.0):
    """Logits of a model of transformers whose weights are changed as the tensors say."""
    model = transformers_peers.reload(folder)
    if any(name.startswith(HEAD) for name in tensors) or any(name.startswith(f"{EMBEDDING}.lora") for name in tensors):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        module, _, kind = name.partition(".lora_")
        if kind == "A.weight":
            weight = parameters[f"{module}.weight"].detach().numpy()
            new = weight + scale(module) * tensors[f"{module}.lora_B.weight"] @ tensor
            if (magnitude := tensors.get(f"{module}.lora_magnitude_vector")) is not None:
                new = magnitude[:, None] * new / np.sqrt((new**2).sum(axis=1, keepdims=True))
            parameters[f"{module}.weight"].data = torch.tensor(new)
        elif kind == "embedding_A":
            weight = parameters[f"{module}.weight"].detach().numpy()
            new = weight + scale(module) * (tensors[f"{module}.lora_embedding_B"] @ tensor).T
            parameters[f"{module}.weight"].data = torch.tensor(new)
        elif not kind:
            parameters[name].data = torch.tensor(tensor)
    return transformers_peers.logits_of(model, TOKENS)


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)


def same(base, folder, expected):
    model, before = of_base(base)
    loaded = sj.load_lora(stack_layers(model), folder)
    np.testing.assert_allclose(sj.forward(loaded, TOKENS), expected, atol=2e-5, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, sj.load_lora(model, folder), unstack_layers(loaded))
    assert np.abs(expected - before).max() > 1e-3
    return loaded


@functools.cache
def of_base(folder):
    """A base, and the logits of transformers."""
    return load_hf(folder), transformers_peers.logits_of(transformers_peers.reload(folder), TOKENS)


def test_ranks_and_alphas_by_layer(base, tmp_path):
    tensors = factors(base, Q[:1]) | factors(base, Q[1:2], 2) | factors(base, Q[2:], 7) | factors(base, V, 3)
    ranks = {"layers.1.self_attn.q_proj": 2, r"^model\.layers\.2\.self_attn\.q_proj": 7, "v_proj": 3}
    alphas = {r"layers\.[12]\..*q_proj": 5}
    write(tmp_path, tensors, rank_pattern=ranks, alpha_pattern=alphas, target_modules=["q_proj", "v_proj"])
    scales = dict(zip(Q, (8 / 4, 5 / 2, 5 / 7), strict=True))
    loaded = same(base, tmp_path, oracle(base, tensors, lambda name: scales.get(name, 8 / 3)))
    assert ranks_of(loaded) == {"q": (7, 5.0), "v": (3, 8.0)}
    sj.save_lora(loaded, tmp_path / "again")
    same(base, tmp_path / "again", oracle(base, tensors, lambda name: scales.get(name, 8 / 3)))


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [1]},
        pytest.param({"layers_to_transform": 1}, marks=pytest.mark.slow),
        {"exclude_modules": ".*[02].*"},
    ],
)
def test_adapters_in_some_layers(base, tmp_path, fields):
    tensors = factors(base, Q[1:2])
    same(base, write(tmp_path, tensors, **fields), oracle(base, tensors))


def test_targets_by_a_pattern(base, tmp_path):
    tensors = factors(base, [Q[0], DOWN[2]])
    same(
        base,
        write(tmp_path, tensors, target_modules="model.layers.(0.self_attn.q|2.mlp.down)_proj"),
        oracle(base, tensors),
    )


@pytest.mark.parametrize("rslora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_dora(base, tmp_path, rslora, caplog):
    modules = [*Q, *V, *DOWN, *GATE, HEAD]
    tensors = factors(base, modules)
    for name in modules:
        tensors[f"{name}.lora_magnitude_vector"] = np.abs(drawn(len(tensors[f"{name}.lora_B.weight"]))) + 0.5
    targets = ["q_proj", "v_proj", "down_proj", "gate_proj", "lm_head"]
    write(tmp_path, tensors, use_dora=True, use_rslora=rslora, target_modules=targets)
    with caplog.at_level(logging.INFO, "streamjax"):
        loaded = same(base, tmp_path, oracle(base, tensors, lambda name: 4.0 if rslora else 2.0))
    assert ranks_of(loaded) == {}
    assert "merged into the weights: lm_head.weight, model.layers.*.mlp.down_proj.weight, " in caplog.text


@pytest.mark.covering
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("modules", [[HEAD], [EMBEDDING], [HEAD, EMBEDDING]])
def test_adapters_on_embedding_and_head(bases, tmp_path, tied, modules, along):
    """PEFT saves the base's weights of these modules along."""
    tensors = factors(bases[tied], [*Q, *([HEAD] if HEAD in modules else [])])
    if EMBEDDING in modules:
        tensors |= {f"{EMBEDDING}.lora_embedding_A": drawn(4, VOCAB), f"{EMBEDDING}.lora_embedding_B": drawn(WIDTH, 4)}
    weights = weights_of(bases[tied])
    names = {name: f"{name}.base_layer.weight" if name in modules else f"{name}.weight" for name in (HEAD, EMBEDDING)}
    bases_own = {names[EMBEDDING]: weights[f"{EMBEDDING}.weight"]}
    bases_own[names[HEAD]] = weights.get(f"{HEAD}.weight", weights[f"{EMBEDDING}.weight"]).copy()
    stored = tensors | bases_own if along else tensors
    write(tmp_path, stored, target_modules=["q_proj", "lm_head", "embed_tokens"])
    loaded = same(bases[tied], tmp_path, oracle(bases[tied], tensors))
    assert not loaded.config.tie_embeddings
    assert ranks_of(loaded) == {"q": (4, 8.0)}


@pytest.mark.covering
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_that_were_trained_whole(bases, tmp_path, tied, infix):
    whole = {f"{HEAD}.weight": drawn(VOCAB, WIDTH), f"{NORM}.weight": drawn(WIDTH) + 1}
    tensors = factors(bases[tied], Q) | whole
    stored = {name.replace(".weight", f"{infix}.weight") if name in whole else name: x for name, x in tensors.items()}
    write(tmp_path, stored, modules_to_save=["lm_head", "norm"])
    loaded = same(bases[tied], tmp_path, oracle(bases[tied], tensors))
    assert not loaded.config.tie_embeddings
    sj.save_hf(sj.merge_lora(loaded), tmp_path / "merged")
    np.testing.assert_allclose(
        transformers_peers.logits_of(transformers_peers.reload(tmp_path / "merged"), TOKENS),
        oracle(bases[tied], tensors), atol=2e-5, rtol=1e-4,
    )  # fmt: skip


def test_embeddings_that_were_saved_along_stay_tied(bases, tmp_path):
    new = {f"{EMBEDDING}.weight": drawn(VOCAB, WIDTH)}
    tensors = factors(bases[True], Q) | new
    loaded = same(bases[True], write(tmp_path, tensors), oracle(bases[True], tensors))
    assert loaded.config.tie_embeddings
    write(tmp_path, tensors | {f"{HEAD}.weight": new[f"{EMBEDDING}.weight"].copy()})
    assert same(bases[True], tmp_path, oracle(bases[True], tensors)).config.tie_embeddings


def test_biases(base, tmp_path):
    biases = {f"{name}.bias": drawn(WIDTH) for name in Q}
    tensors = factors(base, Q)
    stored = tensors | {name.replace(".bias", ".base_layer.bias"): bias for name, bias in biases.items()}
    same(base, write(tmp_path, stored, bias="lora_only"), oracle(base, tensors | biases))
    same(base, write(tmp_path, tensors, bias="all"), oracle(base, tensors))


@pytest.mark.parametrize("prefix", ["", "base_model.model.model.language_"])
def test_names_of_other_tools(base, tmp_path, prefix):
    tensors = factors(base, Q)
    same(base, write(tmp_path, tensors, prefix=prefix), oracle(base, tensors))
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    same(base, write(tmp_path, named), oracle(base, tensors))


def test_weights_keep_their_dtype_and_the_base_its_weights(base, tmp_path):
    tensors = factors(base, Q) | {f"{HEAD}.weight": drawn(VOCAB, WIDTH)}
    model = load_hf(base, jnp.bfloat16)
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]
    loaded = sj.load_lora(model, write(tmp_path, tensors, modules_to_save=["lm_head"]))
    assert loaded.head[...].dtype == jnp.bfloat16
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)] == before


def test_what_does_not_fit_the_base(base, tmp_path):
    def refused(message, tensors, **fields):
        with pytest.raises(ValueError, match=message) as caught:
            sj.load_lora(load_hf(base), write(tmp_path, tensors, **fields))
        assert "\n" not in str(caught.value)

    q = factors(base, Q)
    refused(
        r"embed_tokens.weight' has shape \[66, 16\]; .* ask for \[64, 16\]", q | {f"{EMBEDDING}.weight": drawn(66, 16)}
    )
    refused("model.norm.bias' has no place", q | {f"{NORM}.bias": drawn(WIDTH)})
    refused("lora_A of model.layers.2.self_attn.q_proj is missing", factors(base, Q[:2]))
    refused("lora_A of model.layers.2.self_attn.q_proj is missing", factors(base, Q[:2]), layers_to_transform=[0, 2])
    embedding = {f"{EMBEDDING}.lora_embedding_A": drawn(4, VOCAB), f"{EMBEDDING}.lora_embedding_B": drawn(WIDTH, 4)}
    refused("use_dora on model.embed_tokens, an embedding, is not implemented", embedding, use_dora=True)
    refused("lora_embedding_B of model.embed_tokens is missing", dict(list(embedding.items())[:1]))
    refused("are for the same place", q | {f"{Q[0]}.lora_A.default.weight": q[f"{Q[0]}.lora_A.weight"].copy()})
