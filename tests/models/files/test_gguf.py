"""Models of GGUF files: the logits of transformers, for the model that each file was made of."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import streamjax as sj
from streamjax.parallel.mesh import make_mesh
from tests.architectures import CASES, FALCON, GEMMA, GROUPED, MIXED, QWEN_MOE, SIZES
from tests.covering import rest_slow
from tests.models.files.gguf_peers import convert
from tests.models.transformers_peers import logits_of, peer, tokens_for, write

TOLERANCE = 2e-4
LENGTH = 24
SCALE = {"query_pre_attn_scalar": 6}  # as llama.cpp has it: the width of a head
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_METADATA = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
GPT_OSS = {
    **{**GROUPED, "num_hidden_layers": 3, "head_dim": 6, "sliding_window": 6, "max_position_embeddings": 64},
    **{"num_local_experts": 4, "num_experts_per_tok": 2},
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
STARCODER2 = {**GROUPED, **TOKENS, "sliding_window": None}
FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
MINISTRAL3 = {**YARN, "rope_theta": 1e4, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 0.7}
MINISTRAL3 |= {"beta_fast": 30.0, "beta_slow": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.0}
PLAIN |= {"original_max_position_embeddings": 64}
DEEPSEEK = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
PARITY = {
    "llama": GROUPED,
    "llama-biases": {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-linear": {**GROUPED, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-yarn": {
        **GROUPED,
        "max_position_embeddings": 64,
        "rope_scaling": YARN,
    },
    "llama-heads": {**GROUPED, "head_dim": 8},
    "mistral": {**GROUPED, "sliding_window": None},
    "mixtral": {**CASES["mixtral"], "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": CASES["qwen3"],
    "qwen2_moe": {**QWEN_MOE, "shared_expert_intermediate_size": 10},
    "qwen3_moe": {**QWEN_MOE, "norm_topk_prob": True, "head_dim": 6},
    "smollm3": {**GROUPED, **TOKENS, "num_hidden_layers": 4},
    "olmo2": {**GROUPED, "eos_token_id": 0},
    "olmo3": {**GROUPED, "num_hidden_layers": 4, "sliding_window": 6, "eos_token_id": 0},
    "granite": {**CASES["granite"], "attention_multiplier": 0.3},
    "phi3": {**CASES["phi3"], "pad_token_id": 0, "eos_token_id": 0},
    "gemma2": {**CASES["gemma2"], **SCALE},
    "gemma3": {**GEMMA, **SCALE, "num_hidden_layers": 7},
    "starcoder2": {**STARCODER2, "norm_epsilon": 2e-5},
    "starcoder2-no-biases": {**STARCODER2, "use_bias": False, "tie_word_embeddings": False},
    "gpt_oss": {**GPT_OSS, "rope_scaling": YARN | {"truncate": False}},
    "gpt_oss-plain": {**GPT_OSS, "rope_scaling": {"rope_type": "default"}, "attention_bias": False},
    "cohere2": {**CASES["cohere2"], **TOKENS, **FOUR_LAYERS, "logit_scale": 0.3, "layer_norm_eps": 2e-5},
    "glm4": {**CASES["glm4"], **TOKENS},
    "glm4-whole-heads": {**CASES["glm4"], **TOKENS, "partial_rotary_factor": 1.0, "attention_bias": True},
    "exaone4": {**CASES["exaone4"], **TOKENS},
    "exaone4-full": {**GROUPED, **TOKENS, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "ministral3": {**CASES["ministral3"], "max_position_embeddings": 64, "rope_parameters": MINISTRAL3},
    "ministral3-plain": {**CASES["ministral3"], "max_position_embeddings": 64, "rope_parameters": PLAIN},
    "deepseek_v2": CASES["deepseek_v2"],
    "deepseek_v3": {
        **CASES["deepseek_v3"],
        **TOKENS,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rope_scaling": DEEPSEEK,
    },
    "llama4": {
        **{**GROUPED, "num_hidden_layers": 4, "head_dim": 6, "intermediate_size_mlp": 20, "num_local_experts": 3},
        **{**TOKENS, "interleave_moe_layer_step": 2, "rms_norm_eps": 1e-4},
    },
    "llama4-128": {**GROUPED, **TOKENS, "head_dim": 6, "num_local_experts": 128, "use_qk_norm": False},
    "gemma4": {**CASES["gemma4"], **TOKENS, "num_global_key_value_heads": 1},
    "gemma4-experts": {**CASES["gemma4-experts"], **TOKENS},
    "gpt_neox": CASES["gpt_neox"],
    "gpt_neox-sequential": {**SIZES, "rotary_pct": 1.0, "use_parallel_residual": False},
    "falcon-7b": FALCON,
    "falcon-40b": CASES["falcon-40b"],
    "falcon-11b": {**CASES["falcon-40b"], "num_ln_in_parallel_attn": 1},
    "mpt": CASES["mpt"],
}
METADATA = {
    "llama-linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "llama-yarn": YARN_METADATA,
    "gpt_oss": YARN_METADATA,
    "deepseek_v3": {**YARN_METADATA, "rope.scaling.yarn_log_multiplier": 0.0707},
    "ministral3": YARN_METADATA,
    "gemma4": {"rope_freqs.weight": np.float32([1.0, 1e30, 1e30, 1e30])},
    "gemma4-experts": {"rope_freqs.weight": np.float32([1.0, 1e30, 1e30, 1e30])},
    "llama-heads": {"attention.key_length": 8, "attention.value_length": 8},
}


COMPARED = ("llama", "mistral", "mixtral", "gemma3", "falcon-40b")
# Of what a family may have beside, the ordinary run reads what a file's metadata say: rotations, widths, layouts.
USUAL = [case for case in PARITY if case not in COMPARED and "-" not in case]
USUAL += ["llama-biases", "llama-yarn", "llama-heads", "falcon-7b", "llama4-128"]


def plain(config):
    """A config without what the tokenizer says."""
    return config.replace(bos_token_id=None, eos_token_ids=())


def make_peer(case, values):
    kind = case.split("-")[0]
    kind += "_text" if kind in ("gemma3", "llama4", "gemma4") else ""
    fields = {k: v for k, v in values.items() if k != "model_type"}
    return peer(lambda: transformers.AutoConfig.for_model(kind, **fields))


def assert_same_model(file, folder, atol=0.0):
    mine, theirs = sj.load(file), sj.load(folder)
    assert plain(mine.config) == plain(theirs.config)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def assert_same_logits(model, other):
    tokens = tokens_for(other, LENGTH)
    np.testing.assert_allclose(sj.forward(model, jnp.array(tokens)), logits_of(other, tokens), atol=TOLERANCE)


@pytest.mark.filterwarnings("error:.*streamjax does not know")
@pytest.mark.parametrize("case", rest_slow([case for case in PARITY if case not in COMPARED], *USUAL))
def test_the_model_is_that_of_the_folder(case, tmp_path):
    """Whose logits are those of transformers: tests/models/families holds it."""
    other = make_peer(case, PARITY[case])
    file = convert(other, tmp_path / f"{case}.gguf", **METADATA.get(case, {}))
    assert_same_model(file, write(other, tmp_path / "folder"), atol=1e-6 if "gemma" in case else 0)


@pytest.mark.parametrize("case", COMPARED)
def test_the_logits_are_those_of_transformers(case, tmp_path):
    other = make_peer(case, PARITY[case])
    file = convert(other, tmp_path / f"{case}.gguf", **METADATA.get(case, {}))
    assert_same_logits(sj.load(file), other)


def test_the_factors_of_llama_3_are_read(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    values = {**GROUPED, "head_dim": 16, "max_position_embeddings": 128, "rope_scaling": scaling}
    other = make_peer("llama", values)
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    scaled = other.model.rotary_emb.inv_freq.numpy()
    assert np.any(plain / scaled > 2)
    factors = (plain / scaled).astype(np.float32)
    file = convert(other, tmp_path / "x.gguf", **{"attention.key_length": 16, "rope_freqs.weight": factors})
    assert_same_logits(sj.load(file), other)


def test_long_factors_are_read(tmp_path):
    short, long = [1.0, 1.5], [2.0, 7.0]
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    values = {**GROUPED, "max_position_embeddings": 64, "original_max_position_embeddings": 16, "pad_token_id": 0}
    other = make_peer("phi3", {**values, "rope_scaling": scaling})
    factors = {f"rope_factors_{name}.weight": np.array(v, np.float32) for name, v in (("short", short), ("long", long))}
    file = convert(other, tmp_path / "x.gguf", **factors)
    model = sj.load(file)
    rope = model.config.blocks[0].mixer.rope
    assert (rope.kind, rope.short_factor) == ("longrope", (1.0, 1.5))
    tokens = tokens_for(other, 12)
    np.testing.assert_allclose(sj.forward(model, jnp.array(tokens)), logits_of(other, tokens), atol=TOLERANCE)


def test_which_layers_slide_is_read_where_the_file_says_it(tmp_path):
    other = make_peer("gemma3", {**GEMMA, **SCALE, "layer_types": MIXED})
    file = convert(other, tmp_path / "x.gguf", **{"attention.sliding_window_pattern": [True, False]})
    assert_same_logits(sj.load(file), other)


def test_layers_are_stacked_and_split_over_a_mesh(tmp_path):
    other = make_peer("llama", {**GROUPED, "num_hidden_layers": 3})
    file = convert(other, tmp_path / "x.gguf")
    plain = sj.load(file)
    assert_same_logits(sj.load(file, scan_layers=True), other)
    if len(jax.devices()) > 1:
        split = sj.load(file, mesh=make_mesh(tensor=2, devices=jax.devices()[:2]))
        for mine, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_saved_folder_has_the_same_logits(tmp_path):
    other = make_peer("gpt_neox", CASES["gpt_neox"])
    model = sj.load(convert(other, tmp_path / "x.gguf"))
    sj.save_hf(model, tmp_path / "folder")
    assert_same_logits(sj.load(tmp_path / "folder"), other)


def test_experts_that_nobody_asks_for_are_one_line(tmp_path):
    other = make_peer("mixtral", PARITY["mixtral"])
    file = convert(other, tmp_path / "x.gguf", expert_count=2)
    with pytest.raises(ValueError, match=f"{file}: tensor .* has the shape .*; its metadata ask for 2 experts"):
        sj.load(file)


def test_gpt_oss_in_mxfp4(tmp_path):
    other = make_peer("gpt_oss", {**PARITY["gpt_oss"], "hidden_size": 32, "intermediate_size": 32})
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 16
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("_proj") and ".experts." in name:
                drawn = levels[torch.randint(8, parameter.shape)] * (2 * torch.randint(2, parameter.shape) - 1)
                parameter.copy_(drawn)
    kind = gguf.GGMLQuantizationType.MXFP4
    file = convert(other, tmp_path / "x.gguf", kind, **METADATA["gpt_oss"])
    assert_same_model(file, write(other, tmp_path / "folder"))
    split, whole = sj.load(file, mesh=make_mesh(tensor=2, devices=jax.devices()[:2])), sj.load(file, scan_layers=True)
    np.testing.assert_array_equal(split.layers[1].mlp.up, sj.load(file).layers[1].mlp.up)
    assert_same_logits(whole, other)


@pytest.mark.parametrize("name", ["blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"])
def test_experts_that_do_not_fit_together_are_one_line(name, tmp_path):
    other = make_peer("gpt_oss", PARITY["gpt_oss"])
    file = convert(other, tmp_path / "x.gguf", **METADATA["gpt_oss"], **{name: np.zeros((4, 3, 16), np.float32)})
    with pytest.raises(ValueError, match=f"{file}: tensor '{name}' has (the )?shape .4, ") as caught:
        sj.load(file)
    assert len(str(caught.value).splitlines()) == 1


def test_experts_without_a_part_are_one_line(tmp_path):
    other = make_peer("gpt_oss", PARITY["gpt_oss"])
    file = convert(other, tmp_path / "x.gguf", without=("blk.1.ffn_up_exps.weight",), **METADATA["gpt_oss"])
    with pytest.raises(ValueError, match=f"{file}: tensor 'model.layers.1.mlp.experts.gate_up_proj' of shape"):
        sj.load(file)


def test_a_glm_4_with_images_is_one_line(tmp_path):
    file = convert(make_peer("glm4", PARITY["glm4"]), tmp_path / "x.gguf", **{"rope.dimension_sections": [1, 1, 0, 0]})
    with pytest.raises(ValueError, match=f"{file}: 'glm4.rope.dimension_sections': a GLM-4V, .*without images$"):
        sj.load(file)


def test_older_files_of_deepseek_have_keys_and_values_in_one_tensor(tmp_path):
    """And the widths of heads where newer ones have those of the latent."""
    other = make_peer("deepseek_v3", PARITY["deepseek_v3"])
    widths = {"attention.key_length": 10, "attention.value_length": 5, "attention.head_count_kv": 4}
    file = convert(other, tmp_path / "x.gguf", whole=True, **METADATA["deepseek_v3"], **widths)
    assert_same_model(file, write(other, tmp_path / "folder"))


@pytest.mark.parametrize(("case", "experts", "groups"), [("deepseek_v2", 160, (8, 3)), ("deepseek_v3", 6, (1, 1))])
def test_older_files_of_deepseek_have_no_groups(case, experts, groups, tmp_path):
    """Those of DeepSeek's own models are known; Kimi K2, say, has none."""
    sizes = {"n_routed_experts": experts, "n_group": groups[0], "topk_group": groups[1]}
    other = make_peer(case, {**PARITY[case], **sizes})
    none = {"expert_group_count": None, "expert_group_used_count": None}
    file = convert(other, tmp_path / "x.gguf", **METADATA.get(case, {}), **none)
    experts = sj.load(file).config.blocks[1].mlp
    assert (experts.groups, experts.groups_per_token) == groups
    assert_same_model(file, write(other, tmp_path / "folder"))


def test_keys_and_values_of_latents_are_split_over_a_mesh(tmp_path):
    other = make_peer("deepseek_v2", PARITY["deepseek_v2"])
    file = convert(other, tmp_path / "x.gguf")
    split, plain = sj.load(file, mesh=make_mesh(tensor=2, devices=jax.devices()[:2])), sj.load(file)
    for mine, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(mine, theirs)


WRONG_LATENTS = {
    "widths": ({"blk.1.attn_v_b.weight": np.zeros((4, 5, 9), np.float32)}, "'blk.1.attn_v_b.weight' has the shape "),
    "axes": ({"blk.1.attn_k_b.weight": np.zeros((4, 60), np.float32)}, "'blk.1.attn_v_b.weight' has the shape "),
    "gating": ({"expert_gating_func": 3}, "'deepseek2.expert_gating_func' is 3, not known"),
    "rank": ({"attention.kv_lora_rank": 11}, "'blk.0.attn_kv_a_mqa.weight' has shape [14, 16]"),
}


@pytest.mark.parametrize("case", WRONG_LATENTS)
def test_latents_that_do_not_fit_together_are_one_line(case, tmp_path):
    changes, message = WRONG_LATENTS[case]
    file = convert(make_peer("deepseek_v2", PARITY["deepseek_v2"]), tmp_path / "x.gguf", **changes)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is looked at
        sj.load(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
