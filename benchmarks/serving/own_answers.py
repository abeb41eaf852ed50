"""Write a text that a model said itself, for heads to learn from: questions and its greedy answers, as one chat.

    python -m benchmarks.serving.own_answers --model=FOLDER --output=out/answers.txt
    python -m train.draft_heads --model=FOLDER --input=out/answers.txt --parse_special --output=out/hydra.safetensors
    python -m benchmarks.serving.drafts --model=FOLDER --heads out/hydra.safetensors

Questions are of three kinds, none of them one that benchmarks.serving.drafts asks: about things, for a function of
Python's library with another name in it, and for a text of Python's manual word for word. Answers come in batches, and
are kept beside the text (`.jsonl`): a run that was ended goes on behind them. 192 answers of SmolLM2-135M are some
20,000 tokens, and take 3 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import ast
import heapq
import inspect
import itertools
import json
import re
import statistics
import textwrap
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import numpy as np
from tqdm import tqdm

import streamjax as sj
from streamjax.data.text.chat_templates import encode_chat, render_chat

THINGS = (
    "gravity", "a volcano", "photosynthesis", "a violin", "democracy", "inflation", "a glacier", "the heart", "tea",
    "a tornado", "electricity", "a library", "the Roman Empire", "sleep", "a bicycle", "salt", "a coral reef",
    "vaccines", "the alphabet", "a telescope", "money", "a rainbow", "wool", "the internet", "a lighthouse", "sugar",
    "paper", "soil", "a compass", "music", "a bridge", "rice",
)  # fmt: skip
FORMS = (
    "What is {}?", "Why is {} important?", "Explain {} in simple words.", "Tell me three facts about {}.",
    "Write a short story about {}.", "Describe {} to someone who has never seen it.",
)  # fmt: skip
MODULES: tuple[ModuleType, ...] = (textwrap, statistics, heapq)
LONGEST = 160  # tokens of a prompt


def about_things() -> list[str]:
    """Questions about every thing in every form, the forms taking turns."""
    return [
        FORMS[(i + turn) % len(FORMS)].format(thing) for turn in range(len(FORMS)) for i, thing in enumerate(THINGS)
    ]


def of_functions() -> list[str]:
    """Short functions of Python's library, each to be written again with another name for its first argument."""
    found = []
    for module in MODULES:
        for _, function in inspect.getmembers(module, inspect.isfunction):
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
            assert isinstance(tree, ast.FunctionDef)
            if ast.get_docstring(tree) and len(tree.body) > 1:
                del tree.body[0]
            code, names = ast.unparse(tree), [argument.arg for argument in tree.args.args]
            if names:
                change = f"with the name `{names[0]}` changed to `given`"
                found.append(f"Write this Python function again, {change}:\n\n{code}")
    return found


def to_repeat() -> list[str]:
    """Paragraphs of Python's manual."""
    paragraphs = [part for topic in topics.values() for part in topic.split("\n\n")]
    plain = [" ".join(part.split()) for part in paragraphs if re.match(r"[A-Z][a-z]", part.strip())]
    return [f"Repeat this text word for word:\n\n{part}" for part in plain if 250 < len(part) < 500]


def questions(tokenizer: sj.Tokenizer, count: int) -> list[tuple[str, list[int]]]:
    """So many questions and their prompts; of four, two are about things, and one is of each other kind."""
    things = iter(about_things())
    kinds = itertools.cycle((things, iter(of_functions()), things, iter(to_repeat())))
    found: list[tuple[str, list[int]]] = []
    empty = 0
    while len(found) < count and empty < 4:
        question = next(next(kinds), None)
        empty = empty + 1 if question is None else 0
        if question is not None:
            prompt = encode_chat(tokenizer, [{"role": "user", "content": question}])
            found += [(question, prompt)] * (len(prompt) <= LONGEST)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--answers", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--rows", type=int, default=48, help="answers at a time")
    parser.add_argument("--output", type=Path, default=Path("out/answers.txt"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    asked = questions(tokenizer, arguments.answers)
    ends = tuple({*tokenizer.eos_ids, *model.config.eos_token_ids})
    kept = arguments.output.with_suffix(".jsonl")
    turns = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    cache = sj.kv.preset("dense", capacity=LONGEST + arguments.tokens)
    with tqdm(total=len(asked), initial=len(turns), unit="answer") as bar:
        for at in range(len(turns), len(asked), arguments.rows):
            batch = asked[at : at + arguments.rows]
            rows = batch + batch[:1] * (arguments.rows - len(batch))  # one shape, one program
            state = sj.init_state(model, cache, len(rows))
            said = sj.generate(
                model, state, [prompt for _, prompt in rows], max_new_tokens=arguments.tokens,
                sampler=sj.Sampler(temperature=0), stop_tokens=ends,
            )[1]  # fmt: skip
            new = []
            for (question, _), row in zip(batch, np.asarray(said).tolist(), strict=False):
                answer = [token for token in row if token >= 0 and token not in ends]
                new.append({"question": question, "answer": tokenizer.decode(answer), "tokens": len(answer)})
            with kept.open("a") as file:
                file.writelines(json.dumps(turn) + "\n" for turn in new)
            turns += new
            bar.update(len(new))
    messages = [
        {"role": role, "content": turn[key]}
        for turn in turns
        for role, key in (("user", "question"), ("assistant", "answer"))
    ]
    arguments.output.write_text(render_chat(tokenizer.chat_template, messages, add_generation_prompt=False))
    print(f"{arguments.output}: {len(turns)} answers, {sum(turn['tokens'] for turn in turns)} tokens of them")


if __name__ == "__main__":
    main()
