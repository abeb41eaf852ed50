"""Recall problems: contexts of the asked length with the facts at their depths, and rows to train on."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamjax.data import (
    ByteTokenizer,
    DataConfig,
    load_tokenizer,
    make_eval_batches,
    make_train_iterator,
    render_chat,
)
from streamjax.data.recall.chat_frames import ChatFrame, chat_frame
from streamjax.data.recall.haystack import KINDS, sentences
from streamjax.data.recall.phrasings import PHRASINGS, default_phrasing
from streamjax.data.recall.tasks import TASKS, encode_question, make_problem, stream_context
from streamjax.data.recall.training_rows import RecallRows, open_recall

BYTES = ByteTokenizer()


def text_of(ids):
    return bytes(int(i) for i in ids if i < 256).decode()


@settings(max_examples=40, deadline=None)
@example(
    "multi_key", 0.0, 69, "repeat", 662, "passkey"
)  # the last fact stands so near the end that no sentence fits before it
@given(
    st.sampled_from(TASKS), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 99), st.sampled_from(KINDS),
    st.integers(700, 3000), st.sampled_from(PHRASINGS),
)  # fmt: skip
def test_a_context_has_its_length_and_its_facts_at_their_depths(task, depth, seed, haystack, length, phrasing):
    problem = make_problem(task, depth, seed, haystack, phrasing=phrasing)
    ids = np.concatenate(list(stream_context(problem, length, BYTES)))
    assert len(ids) == length
    assert ids[0] == BYTES.bos_id
    assert (ids[1:] < 256).all()
    text = text_of(ids)
    assert text.startswith(problem.opening)
    text, length = text.removeprefix(problem.opening), length - len(problem.opening)
    assert not re.search("^ |[.?][^ ]", text)  # one text of sentences
    needles = [(where, fact.strip()) for where, fact in problem.needles]
    facts = sum(len(fact) + 1 for _, fact in needles)
    for where, fact in needles:
        assert text.count(fact) == 1
        assert abs(text.index(fact) - where * (length - facts)) < facts + 80  # moved to a sentence's start
    if task == "passkey" and depth in (0.0, 1.0):
        assert text.startswith(needles[0][1]) if depth == 0 else text.endswith(needles[0][1])
    rest = text
    for _, fact in needles:
        rest = rest.replace(fact, "", 1)
    asked = {question.answer.strip(" .") for question in problem.questions}
    assert not any(answer in rest for answer in asked)


@pytest.mark.parametrize("kind", ["byte_level", "prefix_space", "byte_fallback", "first_space", "no_prefix"])
def test_contexts_and_rows_are_the_encoding_of_their_text(kind, tokenizer_folders):
    """Sentences that are encoded one by one are the ids of the text; there is no BOS where the tokenizer adds none."""
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    for task, depth in (("passkey", 0.0), ("multi_key", 0.5), ("passkey", 1.0)):
        problem = make_problem(task, depth, 1)
        ids = np.concatenate(list(stream_context(problem, 700, tokenizer))).tolist()
        assert len(ids) == 700
        whole = tokenizer.encode(tokenizer.decode(ids))
        assert ids[:-9] == whole[: len(ids) - 9]  # the last sentence may be cut
        for question in problem.questions:
            asked, answer = encode_question(tokenizer, question)
            behind = tokenizer.encode("Here we go. " + question.prompt + question.answer)
            assert behind == tokenizer.encode("Here we go.") + asked + answer
            assert tokenizer.decode(asked + answer).endswith(question.answer)
    row = RecallRows(700, tokenizer)[0]
    ids = row["tokens"].tolist()
    assert ids[:-9] == tokenizer.encode(tokenizer.decode(ids))[: len(ids) - 9]
    assert set(np.unique(row["weights"])) == {np.float32(0.02), 1.0}


def test_answers_are_what_the_facts_say():
    """Read off the text by rules of their own."""
    for seed in range(5):
        fact = make_problem("passkey", None, seed)
        assert fact.questions[0].answer == " " + fact.needles[0][1].split("is ")[1][:5] + "."
        keys = make_problem("multi_turn", None, seed)
        known = {f.split(" of ")[1].split(" is ")[0]: f.split(" is ")[1][:5] for _, f in keys.needles}
        assert {q.prompt.split(" of ")[1].split("?")[0]: q.answer[1:6] for q in keys.questions} == known
        many = make_problem("multi_value", None, seed)
        values = [f.split(" is ")[1][:5] for _, f in many.needles]
        assert many.questions[0].answer == " " + ", ".join(values) + "."
        chain = make_problem("variable_tracking", None, seed)
        bound = {}
        for _, f in chain.needles:  # in the order of the context, as a program runs
            name, value = f.removeprefix("VAR ").rstrip(". ").split(" = ")
            bound[name] = bound[value.removeprefix("VAR ")] if value.startswith("VAR") else value
        assert len(set(bound.values())) == 1
        assert chain.questions[0].answer == " " + ", ".join(bound) + "."


def test_answers_in_rulers_words_are_what_the_facts_say():
    """Read off the text by rules of their own; a question and the answer that is begun name what is asked for."""
    for seed, task in itertools.product(range(3), TASKS):
        problem = make_problem(task, None, seed, phrasing="ruler")
        assert ("quiz you" if task != "variable_tracking" else "Memorize") in problem.opening
        for question in problem.questions:
            assert question.asked.startswith("\n")
            assert question.begun.startswith(" ")
            if task == "variable_tracking":
                bound = {}
                for _, fact in problem.needles:
                    name, value = fact.removeprefix("VAR ").rstrip(". ").split(" = ")
                    bound[name] = bound[value.removeprefix("VAR ")] if value.startswith("VAR") else value
                assert question.answer == " " + ", ".join(bound)
                assert next(iter(bound.values())) in question.asked
                continue
            name = re.search(r" for (\w+) mentioned", question.asked)[1]
            assert f" for {name} mentioned" in question.begun
            known = [
                re.fullmatch(r"One of the special magic numbers for (\w+) is: (\d{5})\. ", f)
                for _, f in problem.needles
            ]
            values = [fact[2] for fact in known if fact[1] == name]
            assert question.answer == " " + ", ".join(values)
            assert len(values) == (4 if task == "multi_value" else 1)


CHATML = (
    "{% if messages[0].role != 'system' %}<sys>Be good.</sys>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_model_with_a_chat_template_is_asked_through_it():
    """Context and questions together are what the template would have written of the whole conversation."""
    tokenizer = ByteTokenizer(CHATML)
    problem, frame = make_problem("multi_turn", 0.5, 0, phrasing="ruler"), chat_frame(tokenizer)
    ids = np.concatenate(list(stream_context(problem, 900, tokenizer, frame)))
    assert len(ids) == 900
    context = text_of(ids)
    assert context.startswith("<sys>Be good.</sys><user>Some special magic numbers")
    first, second = problem.questions[:2]
    said = context + frame.prompt(first, True) + first.answer + frame.prompt(second, False)
    user = context.removeprefix("<sys>Be good.</sys><user>") + first.asked
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": first.begun + first.answer}]
    messages.append({"role": "user", "content": second.asked})
    assert said == render_chat(CHATML, messages) + second.begun.lstrip()
    assert chat_frame(ByteTokenizer()) is None
    with pytest.raises(ValueError, match="does not write all that is said: ask by --phrasing=passkey"):
        chat_frame(ByteTokenizer("{{ messages[0].content }}"))
    assert ChatFrame("", "", "").prompt(first, True) == first.asked + first.begun.lstrip()


def test_pretrained_models_are_asked_in_rulers_words(tokenizer_folders):
    assert default_phrasing(load_tokenizer(tokenizer_folders["byte_level"])) == "ruler"
    assert default_phrasing(ByteTokenizer(CHATML)) == "passkey"


def test_the_words_that_models_were_trained_on_stay():
    """The shipped models' claims rest on these, to the letter."""
    problem = make_problem("passkey", 0.5, 1)
    value = problem.questions[0].answer[1:6]
    assert problem.opening == ""
    assert problem.needles[0][1] == f"The pass key is {value}. Remember it. {value} is the pass key. "
    assert problem.questions[0].prompt == "What is the pass key? The pass key is"
    key = make_problem("multi_key", 0.5, 1).questions[0]
    assert re.fullmatch(r"What is the pass key of (\w+)\? The pass key of \1 is", key.prompt)
    rows = text_of(RecallRows(1024, BYTES)[0]["tokens"])
    assert "What is the pass key" in rows
    assert "magic" not in rows


def test_a_depth_is_that_of_the_fact_that_is_asked_for():
    problem = make_problem("multi_key", 0.25, 3)
    name = problem.questions[0].prompt.split(" of ")[1].split("?")[0]
    assert [depth for depth, fact in problem.needles if f"of {name} is" in fact] == [0.25]
    chain = make_problem("variable_tracking", 0.5, 3)
    assert min(depth for depth, _ in chain.needles) == 0.5


def test_a_long_context_is_streamed():
    """Pieces of bounded size, the first at once: nothing is built before it is asked for."""
    problem = make_problem("passkey", 0.9, 0)
    pieces = stream_context(problem, 10**12, BYTES)
    assert all(len(piece) <= 1 << 16 for piece in itertools.islice(pieces, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_problem("pass", 0.5, 0), "unknown recall task 'pass'; use one of passkey"),
        (lambda: make_problem("passkey", 1.5, 0), "depth is 1.5: use 0"),
        (
            lambda: make_problem("passkey", 0.5, 0, phrasing="rule"),
            "unknown phrasing 'rule'; use one of ruler, passkey",
        ),
        (lambda: make_problem("multi_key", 0.5, 0, needles=0), "needles is 0: use 1 to"),
        (lambda: next(sentences("noise", np.random.default_rng(0))), "unknown haystack 'noise'"),
        (
            lambda: next(stream_context(make_problem("passkey", 0.5, 0), 20, BYTES)),
            "a context of 20 tokens has no room for the facts of 'passkey'",
        ),
        (
            lambda: make_train_iterator(DataConfig(source="recall:chess", seq_len=64)),
            "recall rows are made of passkey and multi_key, not of chess",
        ),
        (
            lambda: make_train_iterator(DataConfig(source="recall::cat=64", seq_len=64)),
            "data source 'recall::cat=64': its one option is written cut=TOKENS, not 'cat=64'",
        ),
        (
            lambda: make_train_iterator(DataConfig(source="recall", packing="pack")),
            "data source 'recall' makes whole rows: set packing to \"concat\"",
        ),
    ],
)
def test_bad_requests_are_one_line(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 64])
@pytest.mark.parametrize("index", range(8))
def test_every_answer_of_a_row_can_be_found_before_it(index, cut):
    """The answers have weight 1, all else the filler's; each follows a fact of the same row."""
    row = RecallRows(1024, BYTES, filler_weight=0.125, cut=cut)[index]
    assert row["tokens"].shape == row["targets"].shape == row["weights"].shape == (1024,)
    np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
    assert set(np.unique(row["weights"])) == {0.125, 1.0}
    text, found = text_of(row["targets"]), 0
    inside = np.flatnonzero(np.diff(np.concatenate(([0], row["weights"] == 1, [0]))))
    for start, stop in inside.reshape(-1, 2):
        answer = text[start:stop]
        if stop < 1024:
            assert len(answer) == 7
            assert answer.startswith(" ")
            assert answer.endswith(".")
            key = text[:start].rsplit("pass key", 1)[1]
            assert f"pass key{key}{answer[:6]}" in text[: start - 60]
            found += 1
    assert found >= 3


def test_values_are_cut_where_a_memory_has_its_boundaries():
    """Half of them, each of the four places alike; without being told to, a sixteenth."""
    counts = {}
    for source in ("recall:passkey", "recall:passkey:cut=64"):
        rows = open_recall(source, "train", 512, BYTES)
        # behind BOS, which has no text, and 16 bytes of the fact
        starts = [1 + text_of(rows[i]["tokens"]).index("The pass key is ") + 16 for i in range(120)]
        counts[source] = np.bincount(-np.array(starts) % 64, minlength=64)[1:5]
    assert counts["recall:passkey"].sum() < 20
    assert 45 < counts["recall:passkey:cut=64"].sum() < 80
    assert counts["recall:passkey:cut=64"].min() > 5


def test_the_rows_of_a_run_resume_and_are_shared_out():
    """The same rows after `set_state`; two processes have the even and the odd ones; validation has others."""
    import grain

    config = DataConfig(source="recall", seq_len=128, batch_size=4, prefetch=0)
    rows = RecallRows(128, BYTES)
    whole = make_train_iterator(config)
    first = next(whole)
    np.testing.assert_array_equal(first["tokens"], np.stack([rows[i]["tokens"] for i in range(4)]))
    state, second = whole.get_state(), next(whole)
    again = make_train_iterator(config)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], second["tokens"])
    parts = [next(make_train_iterator(config, shard=grain.sharding.ShardOptions(i, 2)))["tokens"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), first["tokens"][[0, 2, 1, 3]])
    held_out = next(iter(make_eval_batches(config, 1)))
    assert held_out["tokens"].shape == (4, 128)
    assert not (held_out["tokens"] == first["tokens"]).all()
