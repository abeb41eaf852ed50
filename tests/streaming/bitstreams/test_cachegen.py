"""Keys and values that were sent as bits: what comes out is what plain loops say, and a stream goes on with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.bitstreams import Profile, cachegen, decode, encode, measure_profile
from tests.streaming.tiny_models import GQA, build, random_tokens

LENGTH = 64


@pytest.fixture(scope="module")
def sent():
    """A model, a dense state of two streams, and a profile of them."""
    model, tokens = build(GQA), random_tokens(2, LENGTH)
    state = sj.read(model, sj.init_state(model, sj.kv.preset("dense", capacity=96), batch_size=2), tokens, 16)
    return model, state, measure_profile(model, state)


def oracle(x, deviation, step):
    """One channel's numbers after they were sent, in loops; `step` is in standard deviations."""
    scale = max(abs(number) for number in x[::10]) / 127
    out = []
    for start in range(0, len(x), 10):
        anchor = round(x[start] / scale) * scale
        out.append(anchor)
        out += [
            anchor + round((number - anchor) / (step * deviation)) * step * deviation
            for number in x[start + 1 : start + 10]
        ]
    return out


@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_comes_out_is_rounded_as_the_rule_says(sent, level):
    model, state, profile = sent
    new = decode(model, [encode(model, state, profile, level=level, row=1)], profile, capacity=80)
    assert int(new.seen[0]) == int(new.position[0]) == LENGTH
    for layer in range(2):
        step = (0.5, 1.0)[layer] * (0.5, 1.0, 2.0)[level]  # of two layers the first is in the first third
        for i, name in enumerate("kv"):
            old, found = (np.asarray(getattr(s.layers[layer][0], name), np.float64) for s in (state, new))
            for head, channel in ((0, 0), (1, 3), (1, 5)):
                x = old[1, head, :LENGTH, channel]
                expected = oracle(x, float(profile.deviation[2 * layer + i, 6 * head + channel]), step)
                np.testing.assert_allclose(found[0, head, :LENGTH, channel], expected, atol=1e-4)


def test_a_stream_goes_on_where_it_was_sent_to(sent):
    """In parts of different levels; the finer they are, the nearer is what comes next."""
    model, state, profile = sent
    following, off = random_tokens(2, 16, seed=1), []
    _, exact = sj.score(model, jax.tree.map(jnp.copy, state), following, 16)
    for levels in ((0, 0), (1, 1), (2, 2), (0, 2)):
        bits = [
            encode(model, state, profile, level=level, start=at, stop=at + 40)
            for level, at in zip(levels, (0, 40), strict=True)
        ]
        new = decode(model, bits, profile, capacity=96)
        _, nats = sj.score(model, new, following[:1], 16)
        off.append(float(np.abs(np.asarray(nats)[0] - np.asarray(exact)[0]).mean()))
    assert off[0] < off[1] < off[2]
    assert off[0] < off[3] < off[2]


def test_coarser_levels_are_smaller(sent):
    model, state, profile = sent
    sizes = [len(encode(model, state, profile, level=level)) for level in range(3)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_profile_is_kept_in_a_file_and_damage_is_found(sent, tmp_path):
    model, state, profile = sent
    profile.save(tmp_path / "profile.safetensors")
    again = Profile.load(tmp_path / "profile.safetensors")
    bits = encode(model, state, profile)
    assert encode(model, state, again) == bits
    other = build(GQA, seed=1)
    shorter = measure_profile(
        model, sj.read(model, sj.init_state(model, sj.kv.preset("dense", capacity=32)), random_tokens(1, 20))
    )
    half = encode(model, state, profile, stop=40)
    sinks = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=8))
    for act, message in (
        (lambda: decode(model, [bits[:-1]], profile, capacity=96), "these bits are damaged"),
        (lambda: decode(model, [b"text"], profile, capacity=96), "these bits are damaged"),
        (lambda: decode(model, [bits], shorter, capacity=96), "made with profile [0-9a-f]{16}, and this one is"),
        (lambda: decode(other, [bits], profile, capacity=96), "measured with model [0-9a-f]{16}, and this one is"),
        (lambda: decode(model, [half], profile, capacity=96), "the bits end at token 40, and the stream has 64"),
        (lambda: decode(model, [bits, half], profile, capacity=96), "from 0 on follow token 64: give them in order"),
        (lambda: decode(model, [], profile, capacity=96), "the bits end at token 0"),
        (lambda: decode(model, [bits], profile, capacity=63), "64 tokens does not fit a cache of 63"),
        (lambda: encode(model, state, profile, level=3), "level is 3: it must be from 0, the finest, to 2"),
        (lambda: encode(model, state, profile, start=64), "no tokens from 64 to 64: the stream has 64"),
        (lambda: encode(model, sinks, profile), "a bitstream needs every token in every layer"),
        (lambda: Profile.load(tmp_path / "nowhere"), "nowhere: no profile of a bitstream could be read"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


def test_thirds_of_the_layers_have_steps_of_their_own():
    tables = np.zeros((3, 12, 1, 127), np.uint16)
    steps = Profile(np.ones((12, 1), np.float32), tables, "").step(1)[:, 0, 0]
    assert steps.tolist() == [0.5] * 4 + [1.0] * 4 + [1.5] * 4
    assert cachegen.LEVELS[1] == 1
