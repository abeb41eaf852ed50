"""What the pages name exists: links, files, modules, caches, and names of the public interface."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

import streamjax as sj
from tests.docs.pages import CODE, LINK, PAGES, ROOT, anchors, prose, tracked_files

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.mark.quick
@every_page
def test_relative_links_resolve(page):
    broken = []
    for label, target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(path):
            broken.append(f"{target}: no such heading; there are {', '.join(sorted(anchors(path)))}")
        elif label.strip("`").endswith(".py") and Path(label.strip("`")).name != path.name:
            broken.append(f"[{label}] is the name of another file than {target}")
    assert not broken


@pytest.mark.quick
@every_page
def test_modules_to_run_exist(page):
    modules = set(re.findall(r"python3? -m ([a-z_][a-z_.]*\w)", page.read_text()))
    missing = [name for name in sorted(modules) if not is_module(name)]
    assert not missing


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    if path.with_suffix(".py").exists() or (path / "__main__.py").exists():
        return True
    # Modules that are not ours, such as pip; a package of ours without __main__ cannot be run.
    return not path.is_dir() and importlib.util.find_spec(name.partition(".")[0]) is not None and "." not in name


@functools.cache
def known_paths() -> frozenset[str]:
    """Every file and folder by each of the ends of its path: a/b/c.py is also b/c.py and c.py."""
    names = set()
    for file in tracked_files():
        for path in (Path(file), *Path(file).parents):
            parts = path.parts
            names.update("/".join(parts[i:]) for i in range(len(parts)))
    return frozenset(names)


@pytest.mark.quick
@every_page
def test_files_named_in_prose_exist(page):
    folders = {file.partition("/")[0] for file in tracked_files() if "/" in file}
    missing = []
    for code in CODE.findall(prose(page)):
        if not re.fullmatch(r"[\w./-]+", code) or "NAME" in code:
            continue
        ours = code.partition("/")[0] in folders and "/" in code and not code.startswith("/")
        if (code.endswith((".py", ".ipynb")) or ours) and code.strip("/") not in known_paths():
            missing.append(code)
    assert not missing


@pytest.mark.quick
@every_page
def test_caches_named_on_command_lines_are_read(page):
    for text in re.findall(r"--cache=([\w:=,.+-]+)", page.read_text()):
        if text.isupper() or text.startswith("NAME"):
            continue
        sj.kv.parse_preset(text.rstrip(".,"))


@pytest.mark.quick
@every_page
def test_public_names_exist(page):
    missing = []
    for name in sorted(set(re.findall(r"\bsj((?:\.[A-Za-z_]\w*)+)", page.read_text()))):
        thing = sj
        for part in name.strip(".").split("."):
            if not hasattr(thing, part):
                missing.append(f"sj{name}")
                break
            thing = getattr(thing, part)
    assert not missing
