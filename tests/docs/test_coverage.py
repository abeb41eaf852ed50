"""What exists is named in the pages: commands, presets, configs, folders. Tables written by a script are fresh."""

import re
import tomllib
from pathlib import Path

import pytest

import streamjax as sj
from benchmarks import tables as benchmark_tables
from docs import tables
from tests.docs.pages import PAGES, ROOT

pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())


def text(name: str) -> str:
    return (ROOT / name).read_text()


def stems(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.quick
def test_tables_are_what_the_script_writes():
    assert tables.written(text("README.md")) == text("README.md"), "python -m docs.tables writes them anew"


@pytest.mark.quick
def test_benchmarks_are_what_the_script_writes():
    assert benchmark_tables.page() == benchmark_tables.PAGE.read_text(), "python -m benchmarks.tables writes them anew"


@pytest.mark.quick
def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="lacks the marks of 'presets'"):
        tables.written("# Something else\n")


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(sj.kv.presets()))
def test_presets_are_in_readme_and_among_the_systems(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", text("README.md"), re.MULTILINE)
    assert all(cell.strip() for cell in row.strip("|").split(" | "))
    assert re.search(rf"`{name}`|presets/{name}\.py", text("docs/systems.md"))


@pytest.mark.quick
@pytest.mark.parametrize("name", [f"python -m infer.{name}" for name in stems("infer")])
def test_commands_that_run_models_are_described(name):
    assert name in text("docs/inference.md")
    assert name in text("README.md")


@pytest.mark.quick
def test_commands_that_train_are_described():
    assert "`python -m train`" in text("README.md")
    for name in stems("train"):
        assert f"python -m train.{name}" in text("README.md")


@pytest.mark.quick
@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_console_scripts_are_described(page):
    assert set(re.findall(r"`(streamjax-[a-z-]+)`", text(page))) == set(pyproject["project"]["scripts"])


@pytest.mark.quick
def test_the_package_of_commands_names_them():
    assert set(re.findall(r"`(\w+)`", text("infer/__init__.py"))) == set(stems("infer"))


@pytest.mark.quick
@pytest.mark.parametrize("name", stems("configs"))
def test_configs_are_in_the_table(name):
    assert f"| [configs/{name}.py](../configs/{name}.py) |" in text("docs/training.md")


@pytest.mark.quick
def test_every_page_of_the_documentation_is_linked_from_the_readme():
    names = [page.name for page in PAGES if page.parent.name == "docs"]
    assert not [name for name in names if f"(docs/{name}" not in text("README.md")]
    assert all(f"(colab/{path.name})" in text("README.md") for path in (ROOT / "colab").glob("*.ipynb"))


@pytest.mark.quick
def test_the_tree_names_every_folder_of_the_packages():
    named = set(re.findall(r"^([\w./]+/) ", text("README.md"), re.MULTILINE))
    packages = {
        path.parent.relative_to(ROOT).as_posix() + "/"
        for package in ("streamjax", "pallas_kernels")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert packages <= named
    assert all((ROOT / name).is_dir() for name in named)


@pytest.mark.quick
def test_versions_agree():
    version = pyproject["project"]["version"]
    assert re.search(rf"^version: {re.escape(version)}$", text("CITATION.cff"), re.MULTILINE)
    assert re.findall(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[0] == version


@pytest.mark.quick
def test_the_licence_is_the_whole_text():
    licence = Path(ROOT / "LICENSE").read_text()
    assert licence.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "Apache" in pyproject["project"]["license"]["text"]
