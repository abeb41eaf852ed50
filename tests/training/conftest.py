"""A small model, a small batch, and a run that takes seconds."""

import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamjax.commands.shell.runner import keep_compiled
from streamjax.data import DataConfig
from streamjax.models import Decoder, UniformConfig
from streamjax.training import OptimizerConfig, TrainConfig, make_optimizer, make_train_step
from streamjax.training.backprop import loss_and_grad, sequence_chunks
from streamjax.training.run import loop
from streamjax.training.run.initial_state import initial_state

CONFIG = UniformConfig(
    vocab_size=61, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, tie_embeddings=True
)


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """What one test has compiled the next one need not, where the same small programs run again and again.

    Not for all: writing an executable to the cache has been seen to abort the process (JAX 0.10.2, eight devices).
    """
    with keep_compiled(str(tmp_path_factory.mktemp("compiled")), seconds=0.1), pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield


def share_programs(patch):
    """Runs of equal optimizers and options take one step function, and those of one configuration begin with copies of
    one state: each would trace and compile its own again.

    That a process which starts again begins with the same bits is asked of processes, in tests/commands/test_train.py.
    """
    shared, begun = functools.cache(make_train_step), {}

    def make(optimizer, *, elimination=None, **options):
        step = shared(optimizer, **options)  # without arrays, which are no key
        return step if elimination is None else functools.partial(step, elimination=elimination)

    def begin(config, tokenizer, mesh):
        if mesh is not None:
            return initial_state(config, tokenizer, mesh)
        key = json.dumps(config.to_json_dict())
        if key not in begun:
            begun[key] = initial_state(config, tokenizer, mesh)
        return jax.tree.map(jnp.copy, begun[key])  # a step takes it over

    patch.setattr(loop, "make_optimizer", functools.cache(make_optimizer))
    patch.setattr(loop, "make_train_step", make)
    patch.setattr(loop, "initial_state", begin)


@pytest.fixture(scope="session")
def model():
    return jax.jit(lambda key: Decoder(CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="session")
def batch():
    """8 rows of 12 tokens, weights uneven and some of them 0."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 13)).astype(np.int32)
    weights = rng.uniform(0.2, 2.0, (8, 12)).astype(np.float32)
    weights[0, :9] = 0.0
    weights[5] = 0.0
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Thirty text files of a few hundred bytes."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["stream", "runs", "on", "and", "the", "window", "holds", "what", "it", "can", "while", "sinks", "stay"]
    for index in range(30):
        (folder / f"{index:02}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(60, 150))) + "\n")
    return folder


@pytest.fixture
def run_config(text_folder):
    """A run of 12 steps on that text."""
    return TrainConfig(
        name="test",
        model=CONFIG.replace(vocab_size=259, num_layers=1),
        data=DataConfig(source=str(text_folder), seq_len=32, batch_size=4, shuffle_tokens=256),
        steps=12,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3, accumulation=2),
        log_interval=3,
        eval_interval=6,
        eval_batches=2,
        checkpoint_interval=4,
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Attention in blocks of 8, so that short sequences have many; nothing traced with other blocks is used again."""
    monkeypatch.setattr(sequence_chunks, "block_sizes", lambda: (8, 8))
    monkeypatch.setattr(loss_and_grad, "_loss_and_grad", loss_and_grad._loss_and_grad.__wrapped__)
