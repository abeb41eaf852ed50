"""Where the table of kept answers says that an answer stands in a context."""

import streamjax as sj
from benchmarks.caches.real_model.answers_kept import answer_places
from streamjax.data.ruler import Example, Turn
from streamjax.evaluation.context_states import Encoded


def test_an_answer_stands_where_its_tokens_are_and_nowhere_else():
    tokenizer = sj.load_tokenizer("models/stdlib_byte")
    text = "one 7 two 4175 three 41"
    example = Example("niah_single_1", text, (Turn("which?", "", ("4175",), 8),))
    encoded = Encoded(example, [tokenizer.bos_id, *tokenizer.encode(text)], [[]])
    assert {tokenizer.decode([encoded.context[i]]) for i in answer_places(tokenizer, encoded)} == {"4", "1", "7", "5"}
    assert answer_places(tokenizer, encoded) == set(range(11, 15))  # the first token begins the stream
