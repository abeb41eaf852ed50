"""Gated linear attention in flash-linear-attention's layout: a folder is read, written and computes the published rule.

The rule is written out again in float64, token by token, from the tensors by their names in the file (2312.06635,
equation 3; `fla/models/gla` and `fla/layers/gla.py` of flash-linear-attention have the same names).
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamjax as sj
from streamjax.models.families import read_config
from streamjax.models.files.hugging_face import save_hf

D, HEADS, KEYS, VALUES, HIDDEN, VOCAB, LAYERS, RANK, EPS = 12, 2, 6, 24, 20, 17, 2, 16, 1e-3
CONFIG = {
    **{"architectures": ["GLAForCausalLM"], "model_type": "gla", "vocab_size": VOCAB, "hidden_size": D},
    **{"num_hidden_layers": LAYERS, "num_heads": HEADS, "expand_k": 0.5, "expand_v": 2.0, "hidden_act": "swish"},
    **{"intermediate_size": HIDDEN, "norm_eps": EPS, "fuse_norm": True, "attn": None},
}


def tensors(seed=0):
    """Drawn weights by the names that a file has."""
    random = np.random.default_rng(seed)
    shapes = {"model.embeddings.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.attn_norm.weight": (D,), f"{block}.mlp_norm.weight": (D,)}
        rows = {"q": (KEYS, D), "k": (KEYS, D), "v": (VALUES, D), "g": (VALUES, D), "o": (D, VALUES)}
        shapes |= {f"{block}.attn.{name}_proj.weight": shape for name, shape in rows.items()}
        shapes |= {f"{block}.attn.gk_proj.0.weight": (RANK, D), f"{block}.attn.gk_proj.1.weight": (KEYS, RANK)}
        shapes |= {
            f"{block}.attn.gk_proj.1.bias": (KEYS,),
            f"{block}.attn.g_norm_swish_gate.weight": (VALUES // HEADS,),
        }
        shapes |= {f"{block}.mlp.{name}_proj.weight": (HIDDEN, D) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (D, HIDDEN)}
    drawn = {name: 0.5 * random.standard_normal(shape) + ("norm" in name) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def published(weights, tokens):
    """Logits [T, V] of one sequence, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    norm = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w[f"{name}.weight"]  # noqa: E731
    states, logits = np.zeros((LAYERS, HEADS, KEYS // HEADS, VALUES // HEADS)), []
    for token in tokens:
        x = w["model.embeddings.weight"][token]
        for layer in range(LAYERS):
            block = f"model.layers.{layer}"
            y = norm(x, f"{block}.attn_norm")
            q, k, v, g = (w[f"{block}.attn.{name}_proj.weight"] @ y for name in "qkvg")
            raw = w[f"{block}.attn.gk_proj.1.weight"] @ (w[f"{block}.attn.gk_proj.0.weight"] @ y)
            decay = sigmoid(raw + w[f"{block}.attn.gk_proj.1.bias"]) ** (1 / 16)
            q, k, v, g, decay = (part.reshape(HEADS, -1) for part in (q, k, v, g, decay))
            states[layer] = decay[..., None] * states[layer] + k[..., None] * v[:, None]
            out = np.einsum("hk,hkv->hv", q, states[layer]) / np.sqrt(KEYS // HEADS)
            out = norm(out, f"{block}.attn.g_norm_swish_gate") * g * sigmoid(g)
            x = x + w[f"{block}.attn.o_proj.weight"] @ out.reshape(-1)
            y = norm(x, f"{block}.mlp_norm")
            gate, up = (w[f"{block}.mlp.{name}_proj.weight"] @ y for name in ("gate", "up"))
            x = x + w[f"{block}.mlp.down_proj.weight"] @ (gate * sigmoid(gate) * up)
        logits.append(w["lm_head.weight"] @ norm(x, "model.norm"))
    return np.stack(logits)


def test_reads_computes_and_writes(tmp_path):
    weights, tokens = tensors(), np.random.default_rng(1).integers(0, VOCAB, (1, 20)).astype(np.int32)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    model = sj.load(tmp_path / "theirs")
    np.testing.assert_allclose(sj.forward(model, tokens)[0], published(weights, tokens[0]), atol=5e-5)
    save_hf(model, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    assert read_config(json.loads((tmp_path / "ours" / "config.json").read_text())) == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_short_conv": True}, "field 'use_short_conv' is True, which streamjax does not implement"),
        ({"num_kv_heads": 1}, "field 'num_kv_heads' is 1, which streamjax does not implement"),
        ({"clamp_min": -1.0}, "field 'clamp_min' is -1.0, which streamjax does not implement"),
        ({"expand_k": 0.4, "num_heads": 3}, "keys and values of 4 and 24 channels do not divide into 3 heads"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config({**CONFIG, **changes})
    assert "\n" not in str(error.value)


def test_sizes_that_a_config_leaves_out():
    """The 1.3B model's: heads of 256 and 512 channels, an MLP of 5632."""
    config = read_config({"model_type": "gla", "architectures": ["GLAForCausalLM"], "vocab_size": 32000})
    mixer, mlp = config.blocks[0].mixer, config.blocks[0].mlp
    assert (config.num_layers, mixer.key_dim, mixer.value_dim, mlp.mlp_dim) == (24, 256, 512, 5632)
    assert round(config.parameter_count / 1e8) == 14
