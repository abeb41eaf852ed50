"""RoPE frequencies and attention factors against transformers, kind by kind."""

import numpy as np
import pytest
import transformers as hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from streamjax.models import RopeConfig
from streamjax.models.families import read_config
from streamjax.models.rope import make_rotary

SIZES = {"vocab_size": 10, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1}
MODEL = {**SIZES, "num_attention_heads": 8, "max_position_embeddings": 8192}
SHORT = [1.0 + 0.01 * i for i in range(32)]
LONG = [1.0 + 0.5 * i for i in range(32)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
KINDS = {
    "linear": {"rope_type": "linear", "factor": 3.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": YARN,
    "yarn betas": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn untruncated": {**YARN, "truncate": False},
    "yarn mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn one mscale": {**YARN, "mscale": 0.7},
    "yarn attention factor": {**YARN, "attention_factor": 1.3},
    "yarn degenerate": {**YARN, "original_max_position_embeddings": 4},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 1024,
    },
    "longrope factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 16.0,
        "original_max_position_embeddings": 1024,
    },
    "longrope without extension": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 8192,
    },
    "longrope attention factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("theta", [500.0, 500_000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_against_transformers(kind, theta):
    theirs = hf.LlamaConfig(**MODEL, rope_parameters={**KINDS[kind], "rope_theta": theta})
    ours = read_config({**MODEL, "model_type": "llama", "rope_theta": theta, "rope_scaling": KINDS[kind]})
    assert ours == read_config({**theirs.to_dict(), "eos_token_id": None, "bos_token_id": None})
    for length in (1, 1024, 1025, 8192, 8193, 100_000):
        init = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
        frequencies, scale = init(theirs, "cpu", seq_len=length)
        mixer = ours.blocks[0].mixer
        rotary = make_rotary(mixer.rope, mixer.head_dim, length)
        actual = np.array(rotary.steps) * (2 * np.pi / 2**32)
        np.testing.assert_allclose(actual, frequencies.numpy(), rtol=2e-6, atol=2 * np.pi / 2**32)
        assert rotary.scale == pytest.approx(scale, rel=1e-9)


def test_factor_lists_must_fit():
    rope = RopeConfig(kind="longrope", original_max_position=8, short_factor=(1.0,) * 3, long_factor=(1.0,) * 4)
    assert len(make_rotary(rope, 8, 9).steps) == 4
    with pytest.raises(ValueError, match=r"longrope needs 4 factors.* has 3"):
        make_rotary(rope, 8, 8)
