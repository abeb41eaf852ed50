"""Prompts of which layers share a part: against the rules in loops, in streams that go on, and in bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.rope import make_rotary
from tests.oracles import across_layers
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens

LENGTH, ROOM = 40, 12
DENSE = sj.kv.preset("dense", capacity=LENGTH + ROOM)
THREE = GQA.replace(num_layers=3)
MORE = random_tokens(2, ROOM, seed=1)


@jax.jit
def seen(block, x, context):
    """What a layer makes of its input: rotated keys, keys before that, values; and its output."""
    raw = block.mixer.projections.split(block.mixer_input(x))[1]
    _, k, v = block.project(x, context)
    return (k, raw, v), block.parallel(x, context)[0]


@pytest.fixture(scope="module")
def prompt():
    """A model of three layers, two prompts that it has read, and of each layer keys (rotated, then not) and values."""
    model, tokens = build(THREE), random_tokens(2, LENGTH)
    state = sj.read(model, sj.init_state(model, DENSE, batch_size=2), tokens, 20)
    x, context, found = model.embed(jnp.asarray(tokens)), SequenceContext.from_start(2, LENGTH), []
    for i in range(3):
        parts, x = seen(model.layer(i), x, context)
        found.append([np.asarray(part, np.float64) for part in parts])
    return model, state, found


def with_keys(state, held):
    """The dense state, whose layers hold these keys (rotated) and values [T, K, D] of each row instead."""
    layers = list(state.layers)
    for i, rows in held.items():
        (old,) = layers[i]
        parts = []
        for x, part in ((old.k, 0), (old.v, 1)):
            new = np.stack([np.swapaxes(row[part], 0, 1) for row in rows])
            parts.append(jnp.asarray(x).at[:, :, :LENGTH].set(jnp.asarray(new, x.dtype)))
        layers[i] = (dataclasses.replace(old, k=parts[0], v=parts[1]),)
    return jax.tree.map(jnp.copy, dataclasses.replace(state, layers=tuple(layers)))


def rotated(model, x, state):
    rotary = make_rotary(model.config.blocks[0].mixer.rope, 6, state.span)
    turned = rotary(jnp.asarray(x[None], jnp.float32), jnp.arange(LENGTH, dtype=jnp.uint32)[None])
    return np.asarray(turned[0], np.float64)


def by_minicache(model, state, found):
    held = {1: [], 2: []}
    for row in range(2):
        low, high = ([found[i][0][row], found[i][2][row]] for i in (1, 2))
        for i, layer in zip((1, 2), across_layers.minicache(low, high, 0.6, 4), strict=True):
            held[i].append(layer)
    return held


def by_xkv(model, state, found):
    """Groups of two: the first of layers 0 and 1, the other of layer 2 alone."""
    held = {i: [] for i in range(3)}
    for group in ((0, 1), (2,)):
        for row in range(2):
            keys, values = (
                across_layers.xkv([found[i][part][row] for i in group], round(share * len(group) * 12))
                for part, share in ((1, 0.5), (2, 0.4))
            )
            for i, k, v in zip(group, keys, values, strict=True):
                held[i].append([rotated(model, k, state), v])
    return held


CASES = {
    "minicache": (sj.kv.preset("minicache", start=0.34, apart=0.1, room=ROOM), by_minicache),
    "xkv": (sj.kv.preset("xkv", layers=2, keys=0.5, values=0.4, room=ROOM), by_xkv),
}


def nats(model, state, chunk=6):
    """What the tokens that follow cost, read layer by layer; the state is left as it was."""
    return sj.score(model, jax.tree.map(jnp.copy, state), MORE, chunk)[1]


@pytest.mark.parametrize("name", CASES)
def test_layers_read_what_they_share_as_published(prompt, name):
    """A stream goes on as over a dense cache that holds what the oracle says; all layers in one program do the same."""
    model, state, found = prompt
    rule, oracle = CASES[name]
    new = sj.compact(model, state, rule)
    expected = nats(model, with_keys(state, oracle(model, state, found)))
    np.testing.assert_allclose(nats(model, new), expected, atol=2e-3)
    assert np.abs(expected - nats(model, state)).max() > 0.05
    if name == "minicache":
        stepped, _ = sj.step(model, jax.tree.map(jnp.copy, new), MORE[:, :6])
        read = sj.read(model, jax.tree.map(jnp.copy, new), MORE[:, :6], 6)
        np.testing.assert_allclose(stepped.hidden, read.hidden, atol=1e-4)
        for before, *after in zip(*(jax.tree.leaves(x.shared) for x in (new, stepped, read)), strict=True):
            for other in after:
                np.testing.assert_array_equal(before, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cuts_change_nothing(prompt, name):
    model, state, _ = prompt
    new = sj.compact(model, state, CASES[name][0])
    np.testing.assert_allclose(nats(model, new, 1), nats(model, new), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        sj.kv.preset("minicache", start=0.34, apart=1.0, room=ROOM),
        sj.kv.preset("xkv", keys=1.0, values=1.0, room=ROOM),
    ],
    ids=["minicache", "xkv"],
)
def test_with_everything_kept_a_stream_is_as_before(prompt, rule):
    model, state, _ = prompt
    np.testing.assert_allclose(nats(model, sj.compact(model, state, rule)), nats(model, state), atol=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_what_is_shared_is_there_once(prompt, name):
    """Live bytes are those that `describe` says, and fewer than a dense cache of as many tokens has."""
    model, state, _ = prompt
    new = sj.compact(model, state, CASES[name][0])
    sizes = sj.kv.describe(new.caches, model)
    assert new.cache_bytes == sum(x.nbytes for x in jax.tree.leaves(new)) == 2 * sizes.total
    dense = sj.kv.describe(DENSE, model).total
    layers = 2 if name == "minicache" else 3
    assert sizes.total < dense - 0.2 * layers * LENGTH * 2 * 12 * 4
    assert any(part.part.startswith("what layers") for part in sizes.parts)


def test_layers_of_a_pair_share_a_program(prompt):
    model, state, _ = prompt
    caches = sj.compact(model, state, CASES["xkv"][0]).caches
    assert [cache.borrows for cache in caches] == [0, 0, 1]
    one = sj.kv.Cascade(dataclasses.replace(caches[0].tiers[0], group=5), caches[0].tiers[1])
    assert caches[0] != one
    assert caches[0].renumbered() == one.renumbered()


@pytest.mark.quick
def test_what_cannot_be_shared_is_refused(prompt):
    model, state, _ = prompt
    rule = CASES["minicache"][0]
    laid = sj.compact(model, state, rule)
    scored = sj.kv.Cascade(sj.kv.Scored(8, sj.kv.KNorm(), every=4))
    two = build(LOCAL)  # a window in one of two layers
    for act, message in (
        (lambda: sj.init_state(model, rule), "read with another one, such as dense, then sj.compact"),
        (lambda: sj.init_state(model, laid.caches), "no stream can begin with them"),
        (lambda: sj.compact(model, state, rule, MORE), "Pairs takes all that layers hold: give no query"),
        (lambda: sj.compact(model, laid, DENSE), "the tokens of PairedLayers.* cannot be taken out of it"),
        (lambda: sj.compact(model, sj.init_state(model, DENSE), rule), "the streams have read nothing"),
        (lambda: sj.compact(two, sj.init_state(two, DENSE), rule), "the model has no layers that could share"),
        (
            lambda: sj.compact(model, sj.compact(model, state, scored), rule),
            "the heads of layer 1 hold different tokens",
        ),
        (lambda: sj.kv.preset("xkv", keys=0), "Groups.keys is 0: it must be a number above 0"),
        (lambda: sj.kv.preset("xkv", values=2.0), "values is 2.0: it must be a number from 0 to 1"),
        (lambda: sj.kv.preset("minicache", room=0), "room is 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
