"""The text of a checkpoint that has more: its tensors are found under longer names, the others are left out."""

import numpy as np
import pytest
import transformers as hf
from safetensors.numpy import load_file

from streamjax.models import forward
from streamjax.models.files.hugging_face import load_hf, save_hf
from tests.models import transformers_peers
from tests.models.families.peer_cases import BASE, gemma4, llama4

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama4_scout():
    vision = {**VISION, "intermediate_size": 64, "image_size": 28, "patch_size": 14, "vision_output_dim": 16}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    text = llama4(interleave_moe_layer_step=2).to_dict()
    config = hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=100)
    return hf.Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def gemma4_with_vision():
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 8}
    text = gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, pad_token_id=0).to_dict()
    config = hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    return hf.Gemma4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def gemma3_with_vision():
    layers = ["sliding_attention", "full_attention"]
    text = hf.Gemma3TextConfig(**BASE, head_dim=12, sliding_window=5, query_pre_attn_scalar=8, layer_types=layers)
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, image_token_index=100, mm_tokens_per_image=4
    )
    model = hf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(0.0, 0.3)
    return model


@pytest.mark.parametrize("make", [llama4_scout, gemma4_with_vision, gemma3_with_vision])
def test_text_of_a_multimodal_checkpoint(make, tmp_path):
    theirs = make()
    tokens = np.random.RandomState(0).randint(3, 50, (2, 12)).astype(np.int32)
    transformers_peers.write(theirs, tmp_path / "theirs")
    assert any("vision" in name for name in load_file(tmp_path / "theirs" / "model.safetensors"))
    loaded = load_hf(tmp_path / "theirs")
    whole = theirs.language_model if make is llama4_scout else theirs  # Llama 4's whole fails in 5.24
    expected = transformers_peers.logits_of(whole, tokens)
    np.testing.assert_allclose(forward(loaded, tokens), expected, atol=5e-5, rtol=0)
    save_hf(loaded, tmp_path / "ours")
    again = transformers_peers.logits_of(transformers_peers.reload(tmp_path / "ours"), tokens)
    np.testing.assert_allclose(again, expected, atol=5e-5, rtol=0)
