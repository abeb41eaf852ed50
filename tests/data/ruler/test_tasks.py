"""Tasks beside the needles: what a reader who follows the text finds is the answer; scores; documents; bad input."""

import collections
import json
import re

import pytest

from streamjax.data import ByteTokenizer
from streamjax.data.ruler import GROUPS, TASKS, Example, Turn, encode_example, make_example, score, task_names

BYTES = ByteTokenizer()
OTHERS = [task for task in TASKS if task not in (*GROUPS["needles"], "qa_1", "qa_2")]


class Words(ByteTokenizer):
    """About four letters a token, as the tokenizers of large models have."""

    def encode(self, text, add_bos=False, **options):
        return [len(piece) for piece in re.findall(r"\s?[A-Za-z]{1,8}|\s?\d{1,3}|\s?[^\sA-Za-z\d]|\s", text)]


WORDS = Words()


def size(example, tokenizer=WORDS):
    context, prompts = encode_example(tokenizer, example)
    return len(context) + sum(map(len, prompts)) + sum(turn.answer_tokens for turn in example.turns)


def read(example, turn):
    """What the text says, by reading it."""
    text, task = example.context, example.task
    if task in ("vt", "scbench_vt"):
        text = text.rpartition("Memorize and track")[2]
        value = re.search(r"value (\d+)", turn.question)[1]
        known = [name for name, got in re.findall(r"VAR (\w+) = (\d+)", text) if got == value]
        for name, other in re.findall(r"VAR (\w+) = VAR (\w+) ", text):
            known += [name] if other in known else []
        return known
    if task == "cwe":
        counts = collections.Counter(re.findall(r"\d+\. (\S+)", text.rpartition("most often.\n")[2]))
        return [word for word, _ in counts.most_common(10)]
    if task == "fwe":
        counts = collections.Counter(text.partition("coded words. ")[2].split())
        assert counts.most_common(5)[3][1] > counts.most_common(5)[4][1]  # no tie for the third place
        return [word for word, _ in counts.most_common(4)[1:]]
    if task in ("kv", "scbench_kv"):
        pairs = json.loads(text.partition("\n")[2])
        return [pairs[re.search('"(.*)"', turn.question)[1]]]
    if task == "scbench_prefix_suffix":
        first, last = re.findall('"(.*?)"', turn.question)
        return [line for line in text.splitlines()[1:] if line.startswith(first) and line.endswith(last)]
    if task == "mrcr":
        mark, which, asked = re.search(r"Write (\w+), and behind it the (\w+) (.*), to", turn.question).groups()
        written = re.findall(rf"write a {asked}\.\nText: (.*)", text)
        assert len(written) == 4
        return [f"{mark} {written[('first', 'second', 'third', 'fourth').index(which)]}"]
    return re.findall(r"Remember it. (\d+) is the", text)


@pytest.mark.parametrize("task", OTHERS)
@pytest.mark.parametrize("length", [1500, 4500])
def test_the_answer_is_what_the_text_says_and_the_length_is_kept(task, length):
    for seed in range(2):
        example = make_example(task, length, WORDS, seed)
        assert length - 160 < size(example) <= length
        for turn in example.turns:
            assert sorted(read(example, turn)) == sorted(turn.answers)
            assert score(turn, " ".join(turn.answers)) == 1.0
        assert example == make_example(task, length, WORDS, seed)
        assert example.context != make_example(task, length, WORDS, seed + 9).context


def test_a_shared_context_has_five_questions_with_answers_of_their_own():
    for task in GROUPS["scbench"]:
        turns = make_example(task, 2500, WORDS, 1).turns
        assert len({turn.answers for turn in turns}) == len(turns) == 5


def test_counts_and_budgets_are_rulers():
    long, short = (make_example("cwe", length, WORDS).context.rpartition("most often.\n")[2] for length in (4096, 2048))
    for text, often, seldom in ((long, 30, 3), (short, 6, 1)):
        assert set(collections.Counter(re.findall(r"\d+\. (\S+)", text)).values()) == {often, seldom}
    budgets = {"vt": 30, "cwe": 120, "fwe": 50, "niah_multikey_3": 128}
    assert {task: make_example(task, 4096, WORDS).answer_tokens for task in budgets} == budgets
    # Bytes say less than a token: an answer has the room that it takes.
    assert make_example("passkey", 2048, BYTES).answer_tokens == 6
    assert make_example("vt", 8192, BYTES).answer_tokens == len(" AAAAA, BBBBB, CCCCC, DDDDD, EEEEE") + 8


def squad(folder):
    paragraphs = [
        {
            "context": f"Page {page} part {part}: the river {page}-{part} is {page * 7 + part} miles long. " * 3,
            "qas": [
                {"question": f"How long is the river {page}-{part}?", "is_impossible": False,
                 "answers": [{"text": f"{page * 7 + part} miles"}, {"text": f"{page * 7 + part} miles long"}]},
                {"question": "What cannot be known?", "is_impossible": True, "answers": []},
            ],
        }
        for page in range(12) for part in range(4)
    ]  # fmt: skip
    pages = [{"paragraphs": paragraphs[start : start + 4]} for start in range(0, len(paragraphs), 4)]
    (folder / "squad.json").write_text(json.dumps({"data": pages}))


def hotpot(folder):
    entries = [
        {"question": f"Who made thing {i}?", "answer": f"Maker {i}",
         "context": [[f"Thing {i}", ["It was made", f" by Maker {i}."]], [f"Other {i}", ["Nothing. " * 9]]]}
        for i in range(30)
    ]  # fmt: skip
    (folder / "hotpotqa.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(("task", "write"), [("qa_1", squad), ("qa_2", hotpot)])
def test_documents_of_a_user_hide_the_one_with_the_answer(task, write, tmp_path):
    write(tmp_path)
    seen = set()
    for seed in range(6):
        example = make_example(task, 1000, WORDS, seed, documents=tmp_path)
        assert size(example) <= 1000
        documents = re.split(r"Document \d+:\n", example.context)[1:]
        assert len(documents) > 5
        assert len(set(documents)) == len(documents)
        what = re.search(r"river (\S+)\?|thing (\d+)\?", example.question)
        about = f"river {what[1]} is" if task == "qa_1" else f"Thing {what[2]}\n"
        (found,) = [text for text in documents if about in text]
        assert all(answer in found for answer in example.answers)
        assert score(example.turns[0], f"It is {example.answers[0]}.") == 1.0
        seen.add(next(i for i, text in enumerate(documents) if about in text))
    assert len(seen) > 1
    everything = make_example(task, 100_000, WORDS, 0, documents=tmp_path)  # more room than there are documents
    assert everything.context.count("\nDocument") in (47, 48, 59, 60)


def test_scores():
    turn = Turn("?", "", ("AB", "cd", "ef", "gh"), 9)
    assert score(turn, "ab CD, nothing else") == 0.5
    anyone = Turn("?", "", ("one", "two"), 9, "any")
    assert (score(anyone, "Two."), score(anyone, "three")) == (1.0, 0.0)
    alike = Turn("?", "", ("mark the text",), 9, "ratio")
    assert score(alike, " mark the text ") == 1.0
    assert 0.5 < score(alike, "mark the next") < 1.0
    assert score(alike, "the text") == 0.0


def test_names_and_groups():
    assert len(task_names(["ruler"])) == 13
    assert task_names(["vt", "ruler"])[0] == "vt"
    assert len(task_names(["vt", "ruler"])) == 13
    assert {name for group in GROUPS.values() for name in group} <= set(TASKS)
    assert isinstance(make_example("kv", 2048, BYTES), Example)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: task_names(["rulers"]), "unknown task 'rulers'; use one of ruler, needles"),
        (lambda folder: make_example("qa_1", 4096, BYTES), "give a folder with squad.json or dev-v2.0.json"),
        (lambda folder: make_example("qa_2", 4096, BYTES, documents=folder), "no hotpotqa.json or hotpot_dev"),
        (lambda folder: make_example("qa_1", 4096, BYTES, documents=folder), "squad.json: not a file of SQuAD 2.0"),
        (lambda folder: make_example("cwe", 512, BYTES), "task 'cwe' needs .* tokens at least, and the length is 512"),
    ],
)
def test_bad_input_is_one_line(call, message, tmp_path):
    (tmp_path / "squad.json").write_text('{"data": [{"paragraphs": 3}]}')
    with pytest.raises(ValueError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
