"""Configs of recurrent and hybrid models: every field of transformers is known, and what is not there is refused."""

import json
import warnings

import pytest
import torch
import transformers as hf

from streamjax.models.families import FAMILIES, read_config, write_config
from tests.architectures import CASES
from tests.models import transformers_peers
from tests.models.families import recurrent_peers


@pytest.mark.parametrize("case", recurrent_peers.CASES)
def test_fields_and_sizes_are_those_of_transformers(case):
    theirs = transformers_peers.known(recurrent_peers.CASES[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a field that nobody read
        config = read_config(json.loads(theirs.to_json_string()))
    with torch.device("meta"):
        peer = hf.AutoModelForCausalLM.from_config(theirs)
    ends = ("e_score_correction_bias", "expert_bias")
    others = [buffer for name, buffer in peer.named_buffers() if name.endswith(ends)]
    assert config.parameter_count == sum(parameter.numel() for parameter in (*peer.parameters(), *others))
    assert read_config(write_config(config)) == config


KIMI = {"head_dim": 5, "num_heads": 2, "kda_layers": [1], "full_attn_layers": [1]}


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("lfm2", {"layer_types": ["conv", "mamba"]}, "field 'layer_types' has 'mamba'; streamjax has conv, full_att"),
        ("lfm2", {"num_key_value_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ("lfm2_moe", {"num_experts_per_tok": 9}, "ExpertsConfig.experts_per_token is 9: there are 5 experts"),
        ("qwen3_5_moe", {"hidden_act": "gelu"}, "field 'hidden_act' is 'gelu', which streamjax does not implement"),
        (
            "olmo_hybrid",
            {"layer_types": ["conv"] * 2},
            "field 'layer_types' has 'conv'; streamjax has linear_attention",
        ),
        ("olmo_hybrid", {"linear_num_value_heads": 3}, "GatedDeltaConfig.num_heads 3 must be a multiple of num_groups"),
        ("kimi_linear", {"mla_use_nope": False}, "field 'mla_use_nope' is False, which streamjax does not implement"),
        ("kimi_linear", {"mlp_layer_types": ["dense"]}, "field 'mlp_layer_types' is .*; expected 'dense' or 'sparse'"),
        ("kimi_linear", {"layer_types": None, "linear_attn_config": KIMI}, "'linear_attn_config' must name each of 2"),
        ("falcon_h1", {"mamba_n_heads": 3}, "mamba_n_heads 3 x mamba_d_head 6 is not mamba_d_ssm, 20"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "field 'ssm_multipliers' is .*; expected 5 positive numbers"),
        ("falcon_h1", {"attention_bias": True}, "field 'attention_bias' is True, which streamjax does not implement"),
        ("recurrent_gemma", {"block_types": ["lstm"]}, "field 'block_types' has 'lstm'; streamjax has recurrent, att"),
        (
            "recurrent_gemma",
            {"lru_width": 6},
            "field 'lru_width' is 6; it must be a multiple of num_attention_heads, 4",
        ),
        ("nemotron_h", {"hybrid_override_pattern": "M-E"}, "has an MLP without a mixer in front of it"),
        ("nemotron_h", {"hybrid_override_pattern": "M--"}, "has an MLP without a mixer in front of it"),
        ("nemotron_h", {"hybrid_override_pattern": "-M"}, "has an MLP without a mixer in front of it"),
        ("nemotron_h", {"hybrid_override_pattern": ""}, "has no layers"),
        ("nemotron_h", {"layers_block_type": ["mlp", 3]}, "field 'layers_block_type' has 3; streamjax has M"),
        ("nemotron_h", {"sliding_window": 8}, "field 'sliding_window' is 8, which streamjax does not implement"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(case, changes, message):
    kind = FAMILIES[case].model_types[0]
    with pytest.raises(ValueError, match=message) as caught:
        read_config({**CASES[case], **changes, "model_type": kind})
    assert "\n" not in str(caught.value)
