"""What a program holds: plain cases by hand, and passes with guesses against what the compiler allocates."""

import jax
import jax.numpy as jnp
import pytest

import streamjax as sj
from streamjax.streaming.speculative.memory.live_bytes import live_bytes
from streamjax.streaming.speculative.memory.plan import draft_memory
from streamjax.streaming.speculative.memory.stream_passes import pass_bytes
from streamjax.streaming.speculative.ngrams import NGrams
from streamjax.streaming.speculative.tree_verification import verify_tree_pass
from streamjax.streaming.speculative.verification import verify_pass
from tests.streaming.tiny_models import GQA, build

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)  # 256 bytes


@pytest.mark.quick
def test_plain_cases():
    assert live_bytes(lambda x: x @ x, X) == 256
    assert live_bytes(lambda x: ((x @ x) @ x) @ x, X) == 512  # one is read while the next is made
    assert live_bytes(lambda x: jnp.sum(jnp.exp(x + 1)), X) == 4  # computed where it is read
    assert live_bytes(lambda x: jnp.exp(x + 1) @ x, X) == 512
    assert live_bytes(lambda x: x @ x + x, X) == 256  # the sum takes the product's place
    assert live_bytes(lambda x: (x @ x)[:0], X) == 256
    assert live_bytes(lambda x: x.at[0].set(1.0), X) == 256 + 36
    assert live_bytes(lambda x: x.at[0].set(1.0), X, donated=(0,)) == 36  # a row and its index
    assert live_bytes(lambda x: (x @ x, x)[1], X) == 0  # nobody asks for the product

    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda i, y: y.at[i].set(1.0), x)

    assert live_bytes(loop, X, donated=(0,)) < 64
    assert live_bytes(jax.jit(lambda x: ((x @ x) @ x) @ x), X) == 512
    assert live_bytes(lambda x: jax.lax.scan(lambda c, _: (c @ c, c), x, None, length=4)[1], X) >= 4 * 256


@pytest.mark.parametrize("kind", [pytest.param("chain", marks=pytest.mark.slow), "tree"])
def test_a_pass_takes_what_the_compiler_allocates(kind):
    model = build(GQA.replace(vocab_size=2048, d_model=64, head_dim=16, mlp_dim=192))
    rows, guesses, sampler = 4, 7, sj.Sampler(temperature=0)
    cache = sj.kv.preset("dense", capacity=256) if kind == "chain" else sj.kv.preset("streaming_llm", window=124)
    draft = NGrams(length=guesses) if kind == "chain" else NGrams(length=guesses, branches=2)
    state = jax.eval_shape(lambda: sj.init_state(model, cache, rows, note_used=True))
    counted = draft_memory(draft, model, rows, pass_bytes(draft, model, state, sampler)).work
    nodes = 1 + draft.nodes
    tokens, index = jax.ShapeDtypeStruct((rows, nodes), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    if kind == "chain":
        program = verify_pass.lower(model, state, tokens, index, None, index, sampler, ())
    else:
        given = jax.ShapeDtypeStruct((rows, nodes), jnp.bool_)
        program = verify_tree_pass.lower(model, state, tokens, tokens, given, None, index, 1 + guesses, sampler, ())
    allocated = program.compile().memory_analysis().temp_size_in_bytes
    assert counted > 4 * rows * nodes * 2048  # logits behind each node
    assert allocated <= counted <= 1.2 * allocated
