"""Pieces that families put their tensor tables together from."""

from __future__ import annotations

from streamjax.models.config import BlockConfig
from streamjax.models.families.family import Source

Entries = dict[str, tuple[Source, ...]]
BLOCK = "model.layers.{layer}"
# `Family.renames` of models whose text part lies in a multimodal model, in older and newer checkpoints.
MULTIMODAL_RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model."),
    (r"^model\.language_model\.", "model."),
)


def norm(path: str, name: str) -> Entries:
    """A norm: its weight and, where the model has one, its bias."""
    return {f"{path}.{leaf}": (Source(f"{name}.{leaf}", "e -> e"),) for leaf in ("weight", "bias")}


def fused(path: str, name: str, weight: str, bias: str) -> Entries:
    """A projection that is one tensor in the checkpoint too, with its bias."""
    return {path: (Source(f"{name}.weight", weight),), f"{path}_bias": (Source(f"{name}.bias", bias),)}


def qkv(block: BlockConfig, prefix: str, pairs: int = 0) -> Entries:
    """Queries, keys and values as three projections, each query's gate behind it; `pairs`: see `Source`."""
    if block.mixer.recurrent:
        return {}
    lacking = ["k_proj", "v_proj"] if block.mixer.keys_of is not None else ["v_proj"] * block.mixer.value_is_key
    key = block.attention.members - 2 + len(lacking)
    parts = {"q_proj": (0, key), "k_proj": (key, key + 1), "v_proj": (key + 1, key + 2)}
    for name in lacking:
        del parts[name]

    def source(name: str, leaf: str, pattern: str) -> Source:
        return Source(f"{prefix}.{name}.{leaf}", pattern, parts[name], pairs=0 if name == "v_proj" else pairs)

    weights = [source(name, "weight", "(k g d) e -> e k g d") for name in parts]
    biases = [source(name, "bias", "(k g d) -> k g d") for name in parts]
    return {"layers.mixer.projections.qkv": tuple(weights), "layers.mixer.projections.qkv_bias": tuple(biases)}


def out(name: str) -> Entries:
    """The projection of the heads' outputs back to the residual stream."""
    return fused("layers.mixer.projections.out", name, "e (k g d) -> k g d e", "e -> e")


def gate_up(prefix: str, path: str = "layers.mlp", names: tuple[str, str] = ("gate_proj", "up_proj")) -> Entries:
    """The gate and up projections of a gated MLP, as two tensors."""
    parts = {names[0]: (0, 1), names[1]: (1, 2)}
    weights = [Source(f"{prefix}.{name}.weight", "(g f) e -> e g f", part) for name, part in parts.items()]
    biases = [Source(f"{prefix}.{name}.bias", "(g f) -> g f", part) for name, part in parts.items()]
    return {f"{path}.up": tuple(weights), f"{path}.up_bias": tuple(biases)}


def up(name: str) -> Entries:
    """The first projection of an MLP as one tensor: gate first where there is a gate."""
    return fused("layers.mlp.up", name, "(g f) e -> e g f", "(g f) -> g f")


def down(name: str, path: str = "layers.mlp") -> Entries:
    """The second projection of an MLP."""
    return fused(f"{path}.down", name, "e f -> f e", "e -> e")


def experts(router: str, prefix: str, names: tuple[str, str, str]) -> Entries:
    """A mixture of experts, a tensor for each projection of each expert; `names` are those of gate, up and down."""
    gate, up, down = (f"{prefix}.{{expert}}.{name}.weight" for name in names)
    into = "(x g f) e -> x e g f"
    return {
        "layers.mlp.router": (Source(f"{router}.weight", "x e -> e x"),),
        "layers.mlp.up": (Source(gate, into, (0, 1)), Source(up, into, (1, 2))),
        "layers.mlp.down": (Source(down, "(x e) f -> x f e"),),
    }


def packed_experts(prefix: str, path: str = "layers.mlp") -> Entries:
    """The experts' projections as transformers 5 holds them: one tensor for all gates and ups, one for all downs."""
    return {
        f"{path}.up": (Source(f"{prefix}.gate_up_proj", "x (g f) e -> x e g f"),),
        f"{path}.down": (Source(f"{prefix}.down_proj", "x e f -> x f e"),),
    }


def embedding_and_head(embedding: str, final_norm: str, head: str = "lm_head") -> Entries:
    """Embedding, last norm and output head."""
    return {
        "embedding": (Source(f"{embedding}.weight", "v e -> v e"),),
        "head": (Source(f"{head}.weight", "v e -> e v"),),
        "head_bias": (Source(f"{head}.bias", "v -> v"),),
        **norm("norm", final_norm),
    }


def qk_norms(prefix: str, name: str = "norm") -> Entries:
    """Norms over each head's queries and keys."""
    return {
        f"layers.mixer.projections.{letter}_norm.weight": (Source(f"{prefix}.{letter}_{name}.weight", "d -> d"),)
        for letter in ("q", "k")
    }


def without_mlp(block: BlockConfig) -> Entries:
    """Llama's layout of all but the MLP."""
    return {
        **embedding_and_head("model.embed_tokens", "model.norm"),
        **norm("layers.mixer_norm", f"{BLOCK}.input_layernorm"),
        **qkv(block, f"{BLOCK}.self_attn"),
        **out(f"{BLOCK}.self_attn.o_proj"),
        **norm("layers.mlp_norm", f"{BLOCK}.post_attention_layernorm"),
    }


def llama(block: BlockConfig) -> Entries:
    """Llama's layout, which most families share."""
    return {**without_mlp(block), **gate_up(f"{BLOCK}.mlp"), **down(f"{BLOCK}.mlp.down_proj")}
