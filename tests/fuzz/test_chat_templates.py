"""Chat templates of drawn pieces: loops in loops, products, recursion, attributes; text, or one line, soon."""

import random

from streamjax.data import render_chat
from streamjax.data.text import template_process
from tests.fuzz.mutations import draws, read_or_refused

MESSAGES = [{"role": "user", "content": "Hello {{ x }}"}, {"role": "assistant", "content": "\x00\n%s"}]
PLAIN = "{% for m in messages %}{{ m.role }}{% endfor %}"
NAMES = ["messages", "m", "bos_token", "tools", "namespace", "range", "cycler", "joiner", "lipsum", "dict", "f", "loop",
         "raise_exception", "strftime_now", "self", "x"]  # fmt: skip
ATTRIBUTES = ["__class__", "__mro__", "__subclasses__", "__globals__", "__init__", "__dict__", "format", "format_map",
              "mro", "gi_frame", "f_back", "role", "items", "join", "append", "clear", "caller", "x"]  # fmt: skip
FILTERS = ["tojson", "list", "length", "string", "upper", "join", "attr('__class__')", "map('upper')|list", "batch(3)",
           "center(10**9)", "indent(10**8)", "replace('', 'xx')", "round(10**9)", "format(1)", "xmlattr", "sort",
           "groupby('role')", "sum", "random", "pprint", "wordwrap(0)", "tojson(indent=10**9)"]  # fmt: skip
LITERALS = ["1", "-1", "0", "'x'", "10**9", "9**9**9", "[1]", "{}", "none", "1.5", "'%099999999d'", "'{:>9999999999}'",
            "range(99999)", "(1,)", "true", "'\\u0000'"]  # fmt: skip


def expression(rng, depth):
    """An expression, mostly one that fails."""
    if not depth:
        return rng.choice([*NAMES, *LITERALS])
    inner = expression(rng, depth - 1)
    match rng.randrange(6):
        case 0:
            return f"({inner} {rng.choice(['*', '+', '**', '~', '%', '//', 'in', 'and'])} {expression(rng, depth - 1)})"
        case 1:
            return f"{inner}.{rng.choice(ATTRIBUTES)}"
        case 2:
            return f"{inner}[{rng.choice(['0', '-1', '::-1', repr(rng.choice(ATTRIBUTES)), '10**20'])}]"
        case 3:
            return f"({inner}|{rng.choice(FILTERS)})"
        case 4:
            return f"{inner}({rng.choice(['', '1', '10**9', 'messages', '*messages', '**m'])})"
    return inner


def template(rng, depth=3):
    """Statements around expressions."""
    inner = template(rng, depth - 1) if depth else f"{{{{ {expression(rng, 3)} }}}}"
    value = expression(rng, 2)
    match rng.randrange(8):
        case 0:
            return f"{{% for m in {value} %}}{inner}{{% endfor %}}"
        case 1:
            return f"{{% for i in range({rng.choice(['3', '999', '99999', '10**9'])}) %}}{inner}{{% endfor %}}"
        case 2:
            return f"{{% macro f(x) %}}{inner}{{{{ f(x) }}}}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f({value}) }}}}"
        case 3:
            return f"{{% set n = namespace(s={value}) %}}{{% for i in range(60) %}}{{% set n.s = n.s ~ n.s %}}" + (
                f"{{% endfor %}}{inner}"
            )
        case 4:
            return f"{{% if {value} %}}{inner}{{% else %}}{inner}{{% endif %}}"
        case 5:
            return f"{{% set x = {value} %}}{inner}{rng.choice(['', '{%', '{% endfor %}', '{% include x %}', '}}'])}"
    return inner + template(rng, depth - 1) if depth else inner


@draws(60, 1200)
def test_a_drawn_template_is_rendered_or_refused_in_one_line(draws, monkeypatch):
    assert render_chat(PLAIN, MESSAGES) == "userassistant"  # the process is there
    monkeypatch.setattr(template_process, "SECONDS", 0.2)  # 5 seconds each would take long
    rng = random.Random(1)
    rendered = refused = 0
    for draw in range(draws):
        text = template(rng)
        found, _ = read_or_refused(lambda text=text: render_chat(text, MESSAGES), (draw, text))
        rendered += found is not None
        refused += found is None
    assert rendered
    assert refused
    monkeypatch.undo()
    assert render_chat(PLAIN, MESSAGES) == "userassistant"
