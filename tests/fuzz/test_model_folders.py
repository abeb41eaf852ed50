"""Model folders with changes that chance has made: they load as before, or are refused in one line."""

import json
import random
import shutil

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.architectures import tiny_config
from tests.commands.conftest import model_folder  # noqa: F401  (a fixture)
from tests.fuzz.mutations import draws, mutate_bytes, mutate_json, read_or_refused
from tests.streaming.tiny_models import build


@pytest.fixture
def folder(model_folder, tmp_path):  # noqa: F811
    """Without checksums, which would refuse every change before it is read."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "checksums.json").unlink()
    return folder


@draws(200)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_file_is_read_or_refused_in_one_line(folder, name, draws):
    file = folder / name
    whole = file.read_bytes()
    head = len(whole) if name == "config.json" else 8 + int.from_bytes(whole[:8], "little")
    expected = jax.tree.leaves(sj.load(folder))
    rng = random.Random(0)
    refused = 0
    for draw in range(draws):
        changed = mutate_bytes(whole[:head], rng) + whole[head:]
        file.write_bytes(changed)
        model, _ = read_or_refused(lambda: sj.load(folder), (draw, changed[:600]))
        refused += model is None
        if model is not None and name == "model.safetensors":
            for found, value in zip(jax.tree.leaves(model), expected, strict=True):
                np.testing.assert_array_equal(found, value, err_msg=f"draw {draw}")
    assert refused


@pytest.mark.filterwarnings("ignore:config.json has fields that streamjax does not know")
@draws(16)
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "llama4"])
def test_a_changed_config_of_experts_or_latent_attention_is_read_or_refused(tmp_path, case, draws):
    sj.save_hf(build(tiny_config(case)), tmp_path / "m")
    (tmp_path / "m" / "checksums.json").unlink()
    file = tmp_path / "m" / "config.json"
    whole, rng = json.loads(file.read_text()), random.Random(case)
    refused = 0
    for draw in range(draws):
        changed = json.dumps(mutate_json(whole, rng))
        file.write_text(changed)
        model, _ = read_or_refused(lambda: sj.load(tmp_path / "m"), (draw, changed))
        refused += model is None
    assert 0 < refused < draws
