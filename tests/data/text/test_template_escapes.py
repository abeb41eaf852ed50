"""What a stranger's chat template may try to get out of its sandbox: every way to a class from every object that it can
name, and the ways to a file and to modules that are known."""

import re

import jinja2
import pytest

from streamjax.data import render_chat

OBJECTS = {
    "a string": "''",
    "a number": "(1)",
    "a list": "messages",
    "a message": "messages[0]",
    "a method": "messages[0].items",
    "a range": "range(3)",
    "a namespace": "namespace(a=1)",
    "its class": "namespace",
    "a function of ours": "raise_exception",
    "another": "strftime_now",
    "a macro": "f",
    "the template": "self",
    "a fraction": "(1.5)",
}
WAYS = {
    "attribute": "{{{{ {0}.__class__.__mro__ }}}}{{{{ {0}.__class__.__base__.__subclasses__() }}}}",
    "item": "{{{{ {0}['__class__'] }}}}",
    "filter": "{{{{ {0} | attr('__class__') | attr('mro') }}}}",
    "map": "{{{{ [{0}] | map(attribute='__class__') | list }}}}",
    "format": "{{{{ '{{0.__class__}}'.format({0}) }}}}",
}
MACRO = "{% macro f(x) %}{{ x }}{% endmacro %}"
MESSAGES = [{"role": "user", "content": "hello"}]
# What a class, a function, a module or a frame looks like where it is printed, and the first line of /etc/passwd.
LEAK = re.compile(r"<(class|function|module|frame|built-in|code|method)|root:x|object at 0x")
ATTEMPTS = {f"{way} of {thing}": WAYS[way].format(OBJECTS[thing]) for thing in OBJECTS for way in WAYS} | {
    "a file by a macro": "{{ f.__init__.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "a file by a namespace": "{{ namespace.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "a file by the template": "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "a class of nothing": "{{ nothing.__class__.__mro__ }}",
    "modules by nothing": "{{ nothing.__init__.__globals__.sys.modules }}",
}


def unguarded(template):
    """What it renders to, or its error, in Jinja as it comes."""

    def raise_exception(message):
        raise ValueError(message)

    names = {"messages": MESSAGES, "raise_exception": raise_exception, "strftime_now": lambda form: form}
    try:
        return jinja2.Environment().from_string(template).render(names)
    except Exception as error:
        return str(error)


@pytest.mark.parametrize("template", [pytest.param(MACRO + text, id=name) for name, text in ATTEMPTS.items()])
def test_no_way_leads_out(template):
    """Each does without the sandbox."""
    assert LEAK.search(unguarded(template))
    try:
        text = render_chat(template, MESSAGES)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text
    assert not LEAK.search(text)
