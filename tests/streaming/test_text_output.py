"""Text that may be shown at once: whole characters, and never a part of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjax.data import ByteTokenizer
from streamjax.streaming.text_output import TextOutput

TOKENIZER = ByteTokenizer()
LETTERS = st.text(alphabet="ab€𝄞", max_size=24)
STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """What should be left of a text: it ends where, character by character, a stop string first stands complete."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@pytest.mark.quick
@given(text=LETTERS, stops=STOPS)
def test_is_the_text_before_the_first_stop_string(text, stops):
    output, shown, expected = TextOutput(TOKENIZER), "", cut(text, stops)
    stopped = None
    for byte in text.encode():
        stopped = stopped or output.push([byte], stops)
        shown += output.take()
        assert expected[0].startswith(shown)
        if stopped:
            break
    output.release()
    assert (shown + output.take(), stopped is not None) == expected


@given(text=LETTERS, stops=STOPS, width=st.integers(1, 9))
def test_blocks_of_tokens_give_the_same(text, stops, width):
    output, data = TextOutput(TOKENIZER), text.encode()
    for start in range(0, len(data), width):
        if output.push(data[start : start + width], stops):
            break
    output.release()
    assert output.take() == cut(text, stops)[0]


@given(text=LETTERS, at=st.integers(0, 60))
def test_goes_on_from_its_description_in_the_middle_of_anything(text, at):
    data = text.encode()
    first = TextOutput(TOKENIZER)
    first.push(data[:at], ["aab€"])
    second = TextOutput(TOKENIZER, **first.to_json_dict())
    for output in (first, second):
        stopped = output.push(data[at:], ["aab€"])
        output.release()
        assert stopped in (None, "aab€")
    assert second.take() == first.take()


def test_no_half_character_is_shown_until_the_text_is_over():
    output = TextOutput(TOKENIZER)
    output.push("a€".encode()[:-1])
    assert output.take() == "a"
    output.release()
    assert output.take() == ""
    output.finish()
    assert output.take() == "�"
    output.push(b"b")
    assert output.take() == "b"


def test_what_was_not_taken_can_be_dropped():
    output = TextOutput(TOKENIZER)
    output.push(b"ab\xe2", ["bc"])
    output.restart([*b"xyz"])
    output.push(b"c", ["bc"])
    output.finish()
    assert output.take() == "c"
    assert output.to_json_dict() == {"tail": [*b"xyzc"], "held": "", "ready": ""}


def test_its_description_stays_small():
    output = TextOutput(TOKENIZER)
    output.push(b"no end" * 1000)
    output.take()
    assert len(output.to_json_dict()["tail"]) <= 16
