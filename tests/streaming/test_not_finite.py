"""Weights that are NaN or too large: whatever a model is asked, one line says which layer went wrong first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.data import ByteTokenizer
from streamjax.models.nonfinite import NotFiniteError, not_finite
from tests.streaming.tiny_models import GQA, build

BYTES = GQA.replace(vocab_size=259, num_layers=2)
CACHE = sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(14))
GREEDY = sj.Sampler(temperature=0)
MLP = r"first in layer 1 of 2 \(counted from 0\), where mlp.down has 1 of 384 values that are not finite: the weights"


def damaged(value: float, path: str = "layers.1.mlp.down", config=BYTES) -> sj.Decoder:
    """A model with one value of one parameter replaced, or with all of them where it is a number."""
    model, names = build(config), path.split(".")
    part = model
    for name in names:
        part = part[int(name)] if name.isdecimal() else getattr(part, name)
    one = (0,) * part[...].ndim
    part[...] = jnp.full_like(part[...], value) if np.isfinite(value) else part[...].at[one].set(value)
    return model


def start(model, rows: int = 2) -> sj.StreamState:
    return sj.init_state(model, CACHE, rows)


IDS = [[1, 2, 3], [4]]
CALLS = {
    "score": lambda m: sj.score(m, start(m), IDS),
    "generate": lambda m: sj.generate(m, start(m), IDS, max_new_tokens=5, sampler=GREEDY),
    "sampled": lambda m: sj.generate(m, start(m), IDS, max_new_tokens=5, key=jax.random.key(0)),
    "session": lambda m: sj.Session(m, ByteTokenizer(), CACHE).score("hello"),
    "text": lambda m: list(sj.Session(m, ByteTokenizer(), CACHE).generate("hello", max_new_tokens=5)),
    "blocks": lambda m: list(sj.Session(m, ByteTokenizer(), CACHE).generate("hello", max_new_tokens=5, block=3)),
}


@pytest.mark.usual("score-nan", "score-inf", "generate-nan", "session-nan", "blocks-nan")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", CALLS)
def test_every_function_says_which_layer_it_was(call, value):
    model = damaged(value)
    with pytest.raises(NotFiniteError, match=f"logits are not finite; {MLP}") as error:
        CALLS[call](model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("embedding", "nan", "first in the embedding, where embedding has 1 of 4,144 values"),
        ("layers.1.mixer_norm.weight", "nan", "first in layer 1 of 2 .*, where mixer_norm.weight has 1 of 16"),
        ("norm.weight", "inf", "first in the last norm, where weight has 1 of 16"),
        ("head", "nan", "first in the head, where head has 1 of 4,144"),
        ("layers.0.mlp.down", "3e38", "first in layer 0 of 2 .*, whose weights are finite: values overflow float32"),
    ],
)
def test_the_place_is_named(path, value, message):
    with pytest.raises(NotFiniteError, match=message):
        raise not_finite(damaged(float(value), path), [0, 0, 7])


def test_a_sound_model_with_a_damaged_cache():
    model = build(BYTES.replace(num_layers=1))
    state = start(model, 1)
    state = jax.tree.map(lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    with pytest.raises(
        NotFiniteError, match=r"the newest \d tokens alone give none: what the cache holds is not finite"
    ):
        sj.generate(model, state, [[5, 6]], max_new_tokens=2, sampler=GREEDY)


def test_what_came_before_is_kept():
    """Only one token's embedding is damaged: text up to it is yielded, and the state counts what it has read."""
    model = build(BYTES.replace(num_layers=1))
    session = sj.Session(model, ByteTokenizer(), CACHE, sampler=GREEDY)
    text = "".join(session.generate("once", max_new_tokens=12, stop_tokens=()))
    ids = np.asarray(session.state.used[0])
    _, tokens = sj.generate(model, start(model, 1), [[256, *b"once"]], max_new_tokens=12, sampler=GREEDY)
    tokens = tokens[0].tolist()
    victim = next(t for t in tokens[3:] if tokens.index(t) >= 3 and t not in b"once")
    assert ids[victim]
    model.embedding[...] = model.embedding[...].at[victim].set(jnp.nan)
    session.reset()
    pieces = []
    with pytest.raises(NotFiniteError, match="first in the embedding"):
        pieces.extend(session.generate("once", max_new_tokens=12, stop_tokens=()))
    assert session.tokens_seen == 5 + tokens.index(victim) + 1 == int(session.state.seen[0])
    with pytest.raises(ValueError, match="nothing is saved, the stream's state is not finite"):
        session.save("nowhere")
    session.reset()
    assert session.read("again") == 6
    assert text


def test_a_forbidden_token_is_no_error():
    """-inf in a bias is how a model rules a token out."""
    model = build(BYTES.replace(num_layers=1, logit_bias=True))
    model.head_bias[...] = model.head_bias[...].at[7].set(-jnp.inf)
    _, tokens = sj.generate(model, start(model), [[1], [2]], max_new_tokens=4, sampler=GREEDY)
    assert (np.asarray(tokens) >= 0).all()


def test_a_result_that_is_not_waited_for_can_be_looked_at_later():
    session = sj.Session(damaged(float("nan")), ByteTokenizer(), CACHE)
    nats = session.score("hello", wait=False)
    assert np.isnan(nats).any()
    with pytest.raises(NotFiniteError, match="first in layer 1"):
        session.require_finite(nats, "hello")
