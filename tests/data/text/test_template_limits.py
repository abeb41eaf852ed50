"""Templates that take the machine's time or memory, by whatever means: one line, soon, and the next one is rendered."""

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjax.data import render_chat
from streamjax.data.text import template_process
from streamjax.data.text.control_characters import escape_controls, quoted

USER = [{"role": "user", "content": "Hello"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"

SLOW = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}"
    ),
    "a power in one call into C": "{{ (3**(10**8))|string|length }}",
    "a power of the template's values": "{% set n = messages|length * 10**8 %}{{ (3**n)|string|length }}",
}
LARGE = {
    "a product": "{{ 'a' * 10**10 }}",
    "a product of a list": "{{ ([0] * 10**10)|length }}",
    "a filter": "{{ 'x'|center(10**10)|length }}",
    "a method": "{{ 'x'.ljust(10**10)|length }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "another format": "{{ '{:10000000000}'.format(1) }}",
    "indented JSON": "{{ messages|tojson(indent=10**10) }}",
    "doubling": (
        "{% set ns = namespace(s='aaaaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "lists": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "replacement": "{{ ('a' * 10**5)|replace('a', 'b' * 10**5) }}",
}


@pytest.mark.parametrize("name", SLOW)
def test_time_is_bounded(name, monkeypatch):
    render_chat(PLAIN, USER)
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"^chat template refused: it takes more than 0.2 seconds$"):
        render_chat(SLOW[name], USER)
    monkeypatch.undo()
    assert render_chat(PLAIN, USER) == "Hello"


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_bounded(name):
    with pytest.raises(ValueError, match=r"^chat template refused: it takes more than (512 MB of memory|\d+ seconds)$"):
        render_chat(LARGE[name], USER)
    assert render_chat(PLAIN, USER) == "Hello"


def test_output_is_bounded_by_what_was_put_in():
    with pytest.raises(ValueError, match=r"^chat template refused: it writes more than 1,\d{3},\d{3} characters$"):
        render_chat("{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", USER)
    long = [{"role": "user", "content": "long text " * 10**6}]
    assert render_chat(PLAIN, long) == long[0]["content"]


@pytest.mark.parametrize("template", ["{{ " + "(" * 10**5 + " }}", "{{ " + "-" * 10**5 + "1 }}"])
def test_a_template_too_deep_to_compile(template):
    with pytest.raises(ValueError, match=r"^chat template failed: maximum recursion depth exceeded"):
        render_chat(template, USER)


def test_one_process_renders_all_and_is_replaced_when_it_has_died():
    render_chat(PLAIN, USER)
    renderer = template_process._Renderer._current
    for _ in range(100):
        assert render_chat(PLAIN, USER) == "Hello"
    assert template_process._Renderer._current is renderer
    renderer._process.kill()
    renderer._process.wait()
    assert render_chat(PLAIN, USER) == "Hello"
    os.kill(template_process._Renderer._current._process.pid, signal.SIGINT)
    assert render_chat(PLAIN, USER) == "Hello"


def test_an_interrupted_answer_is_not_the_next_ones(monkeypatch):
    render_chat(PLAIN, USER)
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(template_process._Renderer, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_chat("an old answer", USER)
    assert render_chat(PLAIN, USER) == "Hello"


def test_a_forked_process_has_a_renderer_of_its_own():
    render_chat(PLAIN, USER)
    parent = template_process._Renderer._current
    template_process._Renderer.forget()  # what happens in the child
    assert render_chat(PLAIN, USER) == "Hello"
    template_process._Renderer.stop()
    template_process._Renderer._current = parent
    assert render_chat(PLAIN, USER) == "Hello"


def test_what_a_template_says_is_not_obeyed_by_a_terminal():
    with pytest.raises(ValueError, match="chat template") as caught:
        render_chat("{{ raise_exception('\x1b[31mred \x9b2J\u202eterminal') }}", USER)
    assert str(caught.value) == r"chat template failed: \x1b[31mred \x9b2J\u202eterminal"


def test_a_quotation_is_not_obeyed_by_a_terminal():
    assert quoted("red: \x1b[31m\n\nbell: \x07") == "    | red: \\x1b[31m\n    | \n    | bell: \\x07"


@given(st.text())
def test_nothing_that_controls_is_left_and_nothing_else_is_changed(text):
    shown = escape_controls(text)
    assert all(c in "\t\n" or (c >= " " and not "\x7f" <= c <= "\x9f") for c in shown)
    if all(c.isprintable() or c in "\t\n" for c in text):
        assert shown == text
    assert "".join(escape_controls(c) for c in text) == shown  # piece by piece, as it comes
