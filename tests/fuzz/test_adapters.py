"""Adapters with changes that chance has made: they load as they were saved, or are refused in one line."""

import json
import random

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.commands.conftest import model_folder  # noqa: F401  (a fixture)
from tests.fuzz.mutations import VALUES, draws, mutate_bytes, mutate_json, read_or_refused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS = ["(", ")", "a", ".*", "(a+)+", "(.*)*", "[", "]", "^", "$", "\\", "{9999}", "{2,1}", "?", "|", "q_proj", "\0",
         "(?P<x>", "(?i)", "\\1", "\n", "layers.0", "é", "a" * 500]  # fmt: skip


@pytest.fixture
def base(model_folder):  # noqa: F811
    return sj.load(model_folder)


@pytest.fixture
def folder(base, tmp_path):
    """Without checksums, which would refuse every change before it is read."""
    folder = tmp_path / "adapter"
    sj.save_lora(sj.add_lora(base, 2, 4.0, ["q", "down"], jax.random.key(0)), folder)
    (folder / "checksums.json").unlink()
    return folder


@draws(60)
def test_a_changed_configuration_is_read_or_refused_in_one_line(base, folder, draws):
    file, rng = folder / CONFIG, random.Random(0)
    whole = json.loads(file.read_text())
    loaded = 0
    for draw in range(draws):
        changed = json.dumps(mutate_json(whole, rng))
        file.write_text(changed)
        loaded += read_or_refused(lambda: sj.load_lora(base, folder), (draw, changed))[0] is not None
    assert 0 < loaded < draws


@draws(60)
def test_hostile_patterns_are_read_or_refused_in_one_line(base, folder, draws):
    file, rng = folder / CONFIG, random.Random(1)
    whole = json.loads(file.read_text())
    refused = 0
    for draw in range(draws):
        field = rng.choice(["rank_pattern", "alpha_pattern", "target_modules"])
        pattern = "".join(rng.choices(PARTS, k=rng.randint(1, 12)))
        value = rng.choice([2, 4, rng.choice(VALUES)])
        changed = json.dumps(whole | {field: pattern if field == "target_modules" else {pattern: value}})
        file.write_text(changed)
        refused += read_or_refused(lambda: sj.load_lora(base, folder), (draw, changed))[0] is None
    assert refused


@draws(60)
def test_changed_weights_are_those_that_were_saved_or_refused_in_one_line(base, folder, draws):
    """Changes of the header alone: the numbers behind it have no checksums of their own."""
    file, rng = folder / WEIGHTS, random.Random(2)
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:head])
    expected = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(sj.load_lora(base, folder))}
    refused = 0
    for draw in range(draws):
        if draw % 2:
            text = json.dumps(mutate_json(header, rng)).encode()
            changed = len(text).to_bytes(8, "little") + text
        else:
            changed = mutate_bytes(whole[:head], rng)
        file.write_bytes(changed + whole[head:])
        model, _ = read_or_refused(lambda: sj.load_lora(base, folder), (draw, changed))
        refused += model is None
        assert {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)} <= expected, (draw, changed)
    assert refused
