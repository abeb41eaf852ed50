"""Examples in docstrings print what they say, and every public definition has one."""

import ast
import doctest
import functools
import importlib
import inspect

import pytest

import streamjax as sj
from tests.docs.example_names import example_names, write_example_files
from tests.docs.pages import ROOT

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@functools.cache
def examples() -> dict[str, doctest.DocTest]:
    """Every docstring with a `>>>` by the name of what it describes.

    They are read from the sources: functions that are wrapped or jitted hide theirs from `doctest.DocTestFinder`.
    """
    found, parser = {}, doctest.DocTestParser()
    for path in sorted(path for package in ("streamjax", "pallas_kernels") for path in (ROOT / package).rglob("*.py")):
        source = path.read_text()
        if ">>>" not in source:
            continue
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for node in ast.walk(ast.parse(source)):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text and ">>>" in text:
                name = module if isinstance(node, ast.Module) else f"{module}:{node.name}"
                found[name] = parser.get_doctest(text, {}, name, str(path), getattr(node, "lineno", 1))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    write_example_files(folder)
    return folder


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(examples()))
def test_examples_print_what_they_say(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    example = examples()[name]
    example.globs = {**vars(importlib.import_module(name.partition(":")[0])), **example_names()}
    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append)
    assert not said, "".join(said)


@pytest.mark.quick
def test_every_public_definition_has_an_example():
    public = {name: getattr(sj, name) for name in sj.__all__}
    lacking = [name for name, it in public.items() if not inspect.ismodule(it) and ">>>" not in (it.__doc__ or "")]
    assert not lacking
