"""Layers with other token mixers: what is carried over, what stays, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import streamjax as sj
from streamjax.models.config import AttentionConfig, GatedDeltaConfig, SSDConfig, UniformConfig
from streamjax.models.conversion import ConvertedParam, convert_layers, mark_converted
from streamjax.models.layer_stacking import stack_layers
from tests.streaming.tiny_models import build, random_tokens, read_stream

CONFIG = UniformConfig(
    vocab_size=31, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, tie_embeddings=True
)
DELTA = GatedDeltaConfig(num_heads=4, num_groups=4, key_dim=4, value_dim=4)
SHARED = SSDConfig(num_heads=4, num_groups=2, head_dim=4, state_dim=4)
TOKENS = random_tokens(2, 20) % 31


@pytest.mark.parametrize("mixer", [DELTA, SHARED])
def test_a_recurrent_mixer_begins_with_attentions_projections(mixer):
    model = build(CONFIG)
    student = convert_layers(model, (1,), recurrent=mixer)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 16), np.float32))
    q, k, v = model.layers[1].mixer.projections.split(x)
    inside = student.layers[1].mixer.enter(x)
    shared = mixer.group_size
    value = np.repeat(v, 2, axis=2).reshape(2, 3, mixer.num_groups, -1)
    query, key = (np.asarray(part)[:, :, ::shared] for part in (q, np.repeat(k, 2, axis=2)))
    order = (query, key, value) if mixer == DELTA else (value, key, query)
    expected = np.concatenate(order, axis=-1)
    np.testing.assert_allclose(inside[..., : expected.shape[-1]], expected, atol=1e-5)
    out = model.layers[1].mixer.projections.out[...]
    np.testing.assert_array_equal(student.layers[1].mixer.out[...].reshape(-1), out.reshape(-1))
    same = [student.layers[i].mlp.up[...] is model.layers[i].mlp.up[...] for i in range(3)]
    assert all(same)
    assert convert_layers(student, (1,), recurrent=mixer).config == student.config
    assert isinstance(model.layers[1].mixer.config, AttentionConfig)


def test_beside_a_window_with_sinks_it_begins_as_the_window_and_streams_as_it_reads():
    model = convert_layers(build(CONFIG.replace(num_layers=2)), (1,), recurrent=SHARED)
    windowed = convert_layers(model, (0,), window=5, sinks=2)
    student = convert_layers(model, (0,), recurrent=DELTA, window=5, sinks=2)
    np.testing.assert_array_equal(sj.forward(student, TOKENS), sj.forward(windowed, TOKENS))
    assert student.config.blocks[0].mixer.sinks == 2
    assert not np.allclose(sj.forward(student, TOKENS), sj.forward(model, TOKENS), atol=1e-3)
    out = student.layers[0].beside.out
    out[...] = jnp.asarray(np.random.default_rng(3).standard_normal(out.shape, np.float32))
    parts = {name: mark_converted(student, (0,), recurrent_only=name).layers[0] for name in (False, True)}
    kinds = {name: (type(x.mixer.projections.out), type(x.beside.out), type(x.mlp.up)) for name, x in parts.items()}
    assert kinds == {
        False: (ConvertedParam, ConvertedParam, nnx.Param),
        True: (nnx.Param, ConvertedParam, nnx.Param),
    }
    state = sj.init_state(student, sj.kv.preset("streaming_llm"), batch_size=2)
    _, logits = read_stream(student, state, TOKENS, [9, 1])
    np.testing.assert_allclose(logits, sj.forward(student, TOKENS), atol=1e-4)


@pytest.mark.slow
def test_stacked_layers_and_files(tmp_path):
    model = build(CONFIG)
    student = convert_layers(model, (1,), recurrent=DELTA)
    stacked = convert_layers(stack_layers(model), (1,), recurrent=DELTA)
    np.testing.assert_allclose(sj.forward(stacked, TOKENS), sj.forward(student, TOKENS), atol=1e-5)
    marked = mark_converted(student, (1,))
    leaves = jax.tree.leaves(marked, is_leaf=lambda node: isinstance(node, ConvertedParam))
    converted = [leaf for leaf in leaves if isinstance(leaf, ConvertedParam)]
    assert len(converted) == len(jax.tree.leaves(student.layers[1].mixer))
    with pytest.raises(ValueError, match="cannot express"):  # no family of transformers has such layers
        sj.save_hf(student, tmp_path / "student")
    sj.save_safetensors(marked, tmp_path / "student")
    np.testing.assert_array_equal(
        sj.forward(sj.load(tmp_path / "student", jnp.float32), TOKENS), sj.forward(student, TOKENS)
    )


@functools.cache
def converted():
    return convert_layers(build(CONFIG), (0,), recurrent=DELTA)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        ((1,), {}, "give recurrent or window"),
        ((1,), {"recurrent": DELTA, "sinks": 2}, "sinks is 2, and they stand in front of a window: give window"),
        ((3,), {"window": 4}, "layers names layer 3 of a model that has 3"),
        ((0,), {"recurrent": SHARED}, "layers names layer 0, which has no attention alone"),
    ],
)
def test_what_cannot_be_converted_is_one_line(layers, changes, message):
    student = converted()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        convert_layers(student, layers, **changes)
    assert "\n" not in str(error.value)
