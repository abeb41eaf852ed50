"""Recall as it is scored: a model that always answers right is told so, whatever its tokenizer."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.data import ByteTokenizer, load_tokenizer
from streamjax.data.recall.tasks import TASKS, make_problem
from streamjax.evaluation import recall
from tests.data.conftest import KINDS
from tests.data.conftest import tokenizer_folders as tokenizer_folders
from tests.streaming.tiny_models import GQA, build

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kind", ["bytes", *(kind for kind in KINDS if kind != "over_words")])
@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_answerer_is_right(
    kind: str, task: str, tokenizer_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts all its mass on the text's own next token."""
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(tokenizer_folders[kind])
    problem = make_problem(task, 0.5, 0)
    questions = iter(problem.questions)

    def perfect(model, state, tokens, counts):
        question = next(questions)
        text = "Here we go. " + question.prompt + question.answer
        natural = tokenizer.encode(text)[len(tokenizer.encode("Here we go.")) :]
        logits = np.zeros((*tokens.shape, tokenizer.vocab_size), np.float32)
        for row in range(len(tokens)):
            logits[row, np.arange(len(natural) - 1), natural[1:]] = 1
        return state, jnp.asarray(logits)

    monkeypatch.setattr(recall, "step", perfect)
    model = build(GQA.replace(num_layers=1))
    right = recall._ask(model, sj.init_state(model, sj.kv.preset("window", window=4), 2), [problem] * 2, tokenizer)
    assert right == [[True] * len(problem.questions)] * 2
