"""Every architecture against transformers, loaded and saved, over the shapes and switches that it has."""

import jax
import numpy as np
import pytest
import transformers as hf
from safetensors.numpy import load_file
from transformers.models.mpt import modeling_mpt

from streamjax.models import forward
from streamjax.models.families import FAMILIES
from streamjax.models.files.hugging_face import load_hf, save_hf
from tests.covering import rest_slow
from tests.models import transformers_peers
from tests.models.families import recurrent_peers
from tests.models.families.peer_cases import CASES, llama, mpt

TOLERANCE = 5e-5  # five times below what the library promises
PACKED = [case for case in CASES if "mixtral" in case or "_moe" in case]
# What these switch (biases, windows, experts' groups, ways to rotate) others switch by the same code.
OFTEN_SWITCHED = ("llama", "gpt_neox", "falcon", "mpt")
BASE_AND_A_LAYOUT = [
    case
    for family in {case.split("-")[0]: None for case in CASES}
    for case in [case for case in CASES if case.split("-")[0] == family][: 2 if family in OFTEN_SWITCHED else 1]
]
LENGTH = 40  # beyond every window and every original_max_position_embeddings above


@pytest.mark.parametrize("case", rest_slow(CASES, *BASE_AND_A_LAYOUT))
def test_logits_and_round_trip(case, tmp_path):
    model = transformers_peers.peer(CASES[case])
    tokens = transformers_peers.tokens_for(model, LENGTH)
    expected = transformers_peers.logits_of(model, tokens)
    loaded = load_hf(transformers_peers.write(model, tmp_path / "theirs"))
    assert loaded.config.family == case.split("-")[0]
    tolerance = recurrent_peers.TOLERANCE if case in recurrent_peers.CASES else TOLERANCE
    np.testing.assert_allclose(forward(loaded, tokens), expected, atol=tolerance, rtol=0)

    save_hf(loaded, tmp_path / "ours")
    np.testing.assert_allclose(
        transformers_peers.logits_of(transformers_peers.reload(tmp_path / "ours"), tokens), expected, atol=1e-5, rtol=0
    )
    again = load_hf(tmp_path / "ours")
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again, loaded)


@pytest.mark.parametrize("case", ["llama-longrope", "phi3-longrope-partial", "llama-dynamic"])
def test_short_regime(case, tmp_path):
    model = transformers_peers.peer(CASES[case])
    tokens = transformers_peers.tokens_for(model, 16)
    loaded = load_hf(transformers_peers.write(model, tmp_path))
    np.testing.assert_allclose(
        forward(loaded, tokens), transformers_peers.logits_of(model, tokens), atol=TOLERANCE, rtol=0
    )


def test_every_family_has_a_case():
    others = {"rwkv7", "gla"}  # which transformers lacks, see test_rwkv7.py and test_gla.py
    assert {case.split("-")[0] for case in CASES} | others == set(FAMILIES)


def test_a_family_that_transformers_lacks_is_skipped_with_the_reason():
    """And no other fault is."""
    no_class, no_kind = lambda: hf.LlamaNineConfig(), lambda: hf.AutoConfig.for_model("llama9")
    for make, name in ((no_class, "LlamaNineConfig"), (no_kind, "llama9")):
        with pytest.raises(pytest.skip.Exception, match=f"^transformers .* has no {name}$"):
            transformers_peers.known(make)
    with pytest.raises(AttributeError, match="hidden"):
        transformers_peers.known(lambda: hf.LlamaConfig().hidden)
    with pytest.raises(ValueError, match="wide"):
        transformers_peers.known(lambda: int("wide"))


def test_mpt_bias_max(tmp_path, monkeypatch):
    """MPT-StoryWriter's setting, which transformers reads but does not use."""
    model = transformers_peers.peer(mpt({"alibi_bias_max": 16}, n_heads=6))
    build = modeling_mpt.build_mpt_alibi_tensor
    patched = lambda heads, length, device=None: build(heads, length, 16, device)  # noqa: E731
    monkeypatch.setattr(model.transformer, "build_mpt_alibi_tensor", patched)
    tokens = transformers_peers.tokens_for(model, LENGTH)
    loaded = load_hf(transformers_peers.write(model, tmp_path / "theirs"))
    np.testing.assert_allclose(
        forward(loaded, tokens), transformers_peers.logits_of(model, tokens), atol=TOLERANCE, rtol=0
    )
    save_hf(loaded, tmp_path / "ours")
    assert load_hf(tmp_path / "ours").config == loaded.config


def test_peer_shards(tmp_path):
    theirs = transformers_peers.peer(llama())
    tokens = transformers_peers.tokens_for(theirs, 8)
    transformers_peers.write(theirs, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    np.testing.assert_allclose(
        forward(load_hf(tmp_path), tokens), transformers_peers.logits_of(theirs, tokens), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize(
    "case",
    rest_slow(PACKED, "mixtral"),
)
def test_packed_experts_are_read_too(case, tmp_path):
    """transformers holds all experts' projections in one tensor, and some files on the hub do."""
    theirs = transformers_peers.peer(CASES[case])
    transformers_peers.write(theirs, tmp_path / "apart")
    transformers_peers.write(theirs, tmp_path / "packed", save_original_format=False)
    names = [set(load_file(tmp_path / form / "model.safetensors")) for form in ("apart", "packed")]
    assert any(".experts.1." in name for name in names[0])
    assert any(".experts.gate_up_proj" in name for name in names[1])
    assert not any(".experts.1." in name for name in names[1])
    for scan_layers in (False, True):
        apart, packed = (load_hf(tmp_path / form, scan_layers=scan_layers) for form in ("apart", "packed"))
        jax.tree.map(np.testing.assert_array_equal, packed, apart)


def test_more_experts_than_there_are_weights(tmp_path):
    folder = transformers_peers.write(transformers_peers.peer(CASES["mixtral"]()), tmp_path)
    for count in (4, 6, 10**9, 10**30):
        transformers_peers.edit_json(folder / "config.json", num_local_experts=count)
        with pytest.raises(ValueError, match=r"experts|gate") as caught:
            load_hf(folder)
        assert "\n" not in str(caught.value)
