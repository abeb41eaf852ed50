"""How much of a chat's prompt others begin with, too."""

import pytest

pytest.importorskip("starlette")

from streamjax.data.text.chat_templates import encode_chat
from streamjax.data.text.tokenizers import ByteTokenizer
from streamjax.serving.http.reading.shared_beginning import SharedBeginnings
from tests.serving.http.conftest import TEMPLATE

SYSTEM = {"role": "system", "content": "Answer in one word, and be kind."}
TOKENIZER = ByteTokenizer(chat_template=TEMPLATE)


def lengths(beginnings: SharedBeginnings, *chats) -> list[int]:
    return [beginnings.length(chat, {}, encode_chat(TOKENIZER, chat)) for chat in chats]


def user(text: str):
    return {"role": "user", "content": text}


def test_it_ends_where_the_user_begins():
    first, second = [SYSTEM, user("0 or 1?")], [SYSTEM, user("Aa?"), {"role": "assistant", "content": "B"}, user("C")]
    found = lengths(SharedBeginnings(TOKENIZER), first, second)
    ids = encode_chat(TOKENIZER, first)
    common = next(i for i, (a, b) in enumerate(zip(ids, encode_chat(TOKENIZER, second), strict=False)) if a != b)
    assert found == [common, common]
    assert len(SYSTEM["content"]) < common < len(ids)


def test_nothing_is_shared_where_it_is_short_or_the_prompt_begins_otherwise():
    beginnings = SharedBeginnings(TOKENIZER)
    assert lengths(beginnings, [user("Hello there, who are you?")], [SYSTEM]) == [0, 0]
    assert beginnings.length([SYSTEM, user("a")], {}, [1, 2, 3]) == 0


def test_other_messages_before_the_user_are_other_beginnings():
    beginnings = SharedBeginnings(TOKENIZER)
    longer = {**SYSTEM, "content": SYSTEM["content"] + " Always."}
    first, second = lengths(beginnings, [SYSTEM, user("a")], [longer, user("a")])
    assert second == first + 8
