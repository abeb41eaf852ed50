"""A Llama in float64 on plain arrays, which is told of each pair of tokens how far apart they stand and who sees whom.

Reads the tensors of a Hugging Face folder, so it knows nothing of how this library lays weights out. Queries are turned
by the distance of each pair, and keys not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class PlainLlama:
    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: x.astype(np.float64) for name, x in load_file(folder / "model.safetensors").items()}

    def logits(self, tokens: np.ndarray, distance: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """[T, V] of one row: `distance` and `visible` are [T, T], query by key."""
        weights, config = self.weights, self.config
        x = weights["model.embed_tokens.weight"][tokens]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            normed = self._norm(x, layer + "input_layernorm.weight")
            x = x + self._attention(normed, layer + "self_attn.", distance, visible)
            normed = self._norm(x, layer + "post_attention_layernorm.weight")
            gate = normed @ weights[layer + "mlp.gate_proj.weight"].T
            up = normed @ weights[layer + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[layer + "mlp.down_proj.weight"].T
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        return self._norm(x, "model.norm.weight") @ head.T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[name]

    def _attention(self, x: np.ndarray, at: str, distance: np.ndarray, visible: np.ndarray) -> np.ndarray:
        config = self.config
        heads, kv_heads, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        q, k, v = ((x @ self.weights[f"{at}{name}_proj.weight"].T).reshape(len(x), -1, width) for name in "qkv")
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        angle = distance[..., None] * theta ** (-np.arange(0, width, 2) / width)  # [T, T, D / 2]
        out = np.zeros((len(x), heads, width))
        for head in range(heads):
            mine, own, values = q[:, head], k[:, head * kv_heads // heads], v[:, head * kv_heads // heads]
            first, second = mine[:, None, : width // 2], mine[:, None, width // 2 :]
            turned = np.concatenate(
                (first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)), -1
            )
            logits = np.where(visible, np.einsum("ijd,jd->ij", turned, own) / np.sqrt(width), -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ values
        return out.reshape(len(x), -1) @ self.weights[f"{at}o_proj.weight"].T
