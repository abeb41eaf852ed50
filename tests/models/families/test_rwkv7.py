"""RWKV-7 in flash-linear-attention's layout: a folder is read, written and computes the published rule, token by token.

The rule is written out again in float64 from the tensors by their names in the file (2503.14456, sections 4 and 5;
`fla/models/rwkv7` and `fla/layers/rwkv7.py` of flash-linear-attention have the same names).
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamjax as sj
from streamjax.models.families import read_config, write_config
from streamjax.models.files.hugging_face import save_hf

D, HEAD, HIDDEN, VOCAB, LAYERS = 12, 4, 20, 17, 2
RANKS = {"w": 3, "a": 2, "g": 5, "v": 4}
CONFIG = {
    **{"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "vocab_size": VOCAB, "hidden_size": D},
    **{"num_hidden_layers": LAYERS, "head_dim": HEAD, "intermediate_size": HIDDEN, "hidden_act": "sqrelu"},
    **{"decay_low_rank_dim": 3, "a_low_rank_dim": 2, "gate_low_rank_dim": 5, "v_low_rank_dim": 4},
    **{"norm_eps": 1e-3, "hidden_ratio": 4.0, "value_dim": [D] * LAYERS, "fuse_norm": True, "attn": None},
}


def tensors(seed=0):
    """Drawn weights by the names that a file has."""
    random = np.random.default_rng(seed)
    shapes = {"model.embeddings.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D)}
    norms = ["model.norm", "model.layers.0.pre_norm"]
    for layer in range(LAYERS):
        attn, ffn = f"model.layers.{layer}.attn", f"model.layers.{layer}.ffn"
        norms += [f"model.layers.{layer}.attn_norm", f"model.layers.{layer}.ffn_norm", f"{attn}.g_norm"]
        shapes |= {f"{attn}.x_{name}": (1, 1, D) for name in "rwkvag"}
        shapes |= {f"{attn}.{name}": (D,) for name in ("k_k", "k_a")} | {f"{attn}.r_k": (D // HEAD, HEAD)}
        shapes |= {f"{attn}.{name}_proj.weight": (D, D) for name in "rkvo"}
        for name, rank in RANKS.items():
            if name == "v" and layer == 0:
                continue
            shapes |= {f"{attn}.{name}_lora.lora.0.weight": (rank, D), f"{attn}.{name}_lora.lora.2.weight": (D, rank)}
            shapes |= {f"{attn}.{name}_lora.lora.2.bias": (D,)} if name != "g" else {}
        shapes |= {f"{ffn}.x_k": (D,), f"{ffn}.key.weight": (HIDDEN, D), f"{ffn}.value.weight": (D, HIDDEN)}
    drawn = {name: 0.5 * random.standard_normal(shape) for name, shape in shapes.items()}
    for name in norms:
        drawn |= {f"{name}.weight": 1 + 0.3 * random.standard_normal(D), f"{name}.bias": random.standard_normal(D)}
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def published(weights, tokens):
    """Logits [T, V] of one sequence, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def norm(x, name, eps=CONFIG["norm_eps"]):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
        weight, bias = w[f"{name}.weight"].reshape(x.shape), w[f"{name}.bias"].reshape(x.shape)
        return x * weight + bias

    def low(x, name, bend):
        y = w[f"{name}.lora.2.weight"] @ bend(w[f"{name}.lora.0.weight"] @ x)
        return y + w.get(f"{name}.lora.2.bias", 0.0)

    heads = (D // HEAD, HEAD)
    before = {(layer, part): np.zeros(D) for layer in range(LAYERS) for part in ("attn", "ffn")}
    states = np.zeros((LAYERS, *heads, HEAD))  # [key channel, value channel]
    logits = []
    for token in tokens:
        x, first = norm(w["model.embeddings.weight"][token], "model.layers.0.pre_norm"), None
        for layer in range(LAYERS):
            attn, ffn = f"model.layers.{layer}.attn", f"model.layers.{layer}.ffn"
            y = norm(x, f"model.layers.{layer}.attn_norm")
            delta, before[layer, "attn"] = before[layer, "attn"] - y, y
            r, decay, k, v, a, g = (y + delta * w[f"{attn}.x_{name}"][0, 0] for name in "rwkvag")
            r, k, read = w[f"{attn}.r_proj.weight"] @ r, w[f"{attn}.k_proj.weight"] @ k, v
            v = w[f"{attn}.v_proj.weight"] @ v
            decay = np.exp(-np.exp(-0.5) * sigmoid(low(decay, f"{attn}.w_lora", np.tanh)))
            a, g = sigmoid(low(a, f"{attn}.a_lora", lambda x: x)), low(g, f"{attn}.g_lora", sigmoid)
            if first is None:
                first = v
            else:
                v = v + (first - v) * sigmoid(low(read, f"{attn}.v_lora", lambda x: x))
            kappa = (k * w[f"{attn}.k_k"]).reshape(heads)
            kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
            k = k * (1 + (a - 1) * w[f"{attn}.k_a"])
            r, decay, k, v, a = (part.reshape(heads) for part in (r, decay, k, v, a))
            out = np.zeros(heads)
            for h, state in enumerate(states[layer]):
                new = decay[h, :, None] * state - np.outer(kappa[h] * a[h], kappa[h] @ state) + np.outer(k[h], v[h])
                states[layer, h], out[h] = new, r[h] @ new
            out = norm(out, f"{attn}.g_norm", HEAD * CONFIG["norm_eps"])
            out = out + (r * k * w[f"{attn}.r_k"]).sum(axis=-1, keepdims=True) * v
            x = x + w[f"{attn}.o_proj.weight"] @ (out.reshape(D) * g)
            y = norm(x, f"model.layers.{layer}.ffn_norm")
            delta, before[layer, "ffn"] = before[layer, "ffn"] - y, y
            hidden = w[f"{ffn}.key.weight"] @ (y + delta * w[f"{ffn}.x_k"])
            x = x + w[f"{ffn}.value.weight"] @ np.square(np.maximum(hidden, 0))
        logits.append(w["lm_head.weight"] @ norm(x, "model.norm"))
    return np.stack(logits)


def write(folder, weights, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_reads_computes_and_writes(tmp_path):
    weights, tokens = tensors(), np.random.default_rng(1).integers(0, VOCAB, (1, 20)).astype(np.int32)
    model = sj.load(write(tmp_path / "theirs", weights))
    np.testing.assert_allclose(sj.forward(model, tokens)[0], published(weights, tokens[0]), atol=2e-5)
    save_hf(model, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: values[name] for name in CONFIG if name != "fuse_norm"} == {
        **{name: value for name, value in CONFIG.items() if name != "fuse_norm"},
        "hidden_ratio": HIDDEN / D,
    }


@pytest.mark.slow
def test_weights_in_eight_bits(tmp_path):
    weights, tokens = tensors(), np.random.default_rng(1).integers(0, VOCAB, (1, 20)).astype(np.int32)
    model = sj.load(write(tmp_path / "theirs", weights), weights="int8")
    found, expected = np.asarray(sj.forward(model, tokens)[0]), published(weights, tokens[0])
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995


def test_the_first_version_of_the_layout(tmp_path):
    """All six mixes of a layer in one tensor, in another order."""
    weights = tensors()
    older = dict(weights)
    for layer in range(LAYERS):
        parts = [older.pop(f"model.layers.{layer}.attn.x_{name}")[0, 0] for name in "rwkvag"]
        older[f"model.layers.{layer}.attn.x_x"] = np.stack(parts)
    new, old = sj.load(write(tmp_path / "new", weights)), sj.load(write(tmp_path / "old", older))
    np.testing.assert_array_equal(new.layer(2).mixer.mix[...], old.layer(2).mixer.mix[...])


def test_a_published_config():
    """RWKV7-Goose-World3-2.9B's sizes, as flash-linear-attention's conversion of it has them."""
    values = {
        **{"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "vocab_size": 65536, "hidden_size": 2560},
        **{"num_hidden_layers": 32, "head_dim": 64, "num_heads": 32, "hidden_ratio": 4.0, "intermediate_size": 10240},
        **{"decay_low_rank_dim": 96, "a_low_rank_dim": 96, "gate_low_rank_dim": 320, "v_low_rank_dim": 64},
        **{"value_dim": [2560] * 32, "norm_eps": 1e-5, "norm_bias": True, "norm_first": True, "use_cache": True},
    }
    config = read_config(values)
    assert (config.num_layers, config.blocks[0].mixer.num_heads, config.blocks[1].mixer.projected) == (64, 40, 10240)
    assert round(config.parameter_count / 1e8) == 29
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn": {"layers": [1]}}, "field 'attn' is .*, which streamjax does not implement"),
        ({"value_dim": 24}, "field 'value_dim' is 24; streamjax has values of hidden_size, 12"),
        ({"hidden_act": "relu"}, "field 'hidden_act' is 'relu', which streamjax does not implement"),
        ({"head_dim": 5}, "hidden_size 12 is no multiple of head_dim 5"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config({**CONFIG, **changes})
    assert "\n" not in str(error.value)
