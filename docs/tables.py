"""Write the tables of README.md that the code itself decides: the named caches, the model families and the folders.

python -m docs.tables

Each table stands between two marks, `<!-- NAME: written by python -m docs.tables -->` and `<!-- NAME ends -->`.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np

import streamjax as sj
from streamjax.kv.channels.projection_file import HeadProjections, Projections
from streamjax.kv.codecs.measured.codebook_file import LayerCodebooks
from streamjax.kv.merging.kernel_file import LayerKernels
from streamjax.kv.scores.retaining_file import LayerRetainingHeads
from streamjax.models.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
# Folders whose purpose no docstring of a package says.
OTHER_FOLDERS = {
    "configs/": "one Python file a training run; its docstring states the command, the result and the time",
    "train/": "`python -m train`: entries to `streamjax/commands`",
    "infer/": "`python -m infer.stream` and the like: entries to `streamjax/commands`",
    "models/": "small models trained by this library, each with a card; the first part of the demonstration reads one",
    "benchmarks/": "figures and the scripts that print them; `benchmarks/results/` keeps what they printed",
    "colab/": "notebooks for TPU, GPU or CPU",
    "docs/": "pages of documentation, and the script that writes README's tables",
    "tests/": "mirrors the tree; `tests/oracles/` holds slow, plain forms of the published algorithms",
}

KINDS = (
    "Everything, windows and sinks",
    "Pages that queries choose",
    "Scores: what leaves is decided by head",
    "Budgets over layers and heads",
    "What leaves is merged into what stays",
    "Fewer bits",
    "Fewer channels",
    "Groups of heads",
)


def presets() -> str:
    """A table of every named cache for each kind: tiers, what it keeps, whether a stream can go on for ever."""
    rows: dict[str, list[str]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        gates = Path(folder) / "gates.json"
        gates.write_text(json.dumps({"gates": [[head / 20 for head in range(20)]]}))
        networks = Path(folder) / "retaining.safetensors"
        one = sj.kv.RetainingHeads.from_arrays(np.ones((8, 2)), np.ones((2, 1)), model="any")
        LayerRetainingHeads((one,), "any", 1).save(networks)
        books = Path(folder) / "books.safetensors"
        entries = np.ones(256, np.float32).tobytes()
        LayerCodebooks((sj.kv.Codebooks(entries, entries, 1, "any"),), "any", 1).save(books)
        turns = Path(folder) / "projections.safetensors"
        layer = Projections(np.eye(8)[None], np.eye(8)[None], np.full((2, 1), 4))
        HeadProjections((layer,), "any", 1).save(turns)
        flows = Path(folder) / "kernels.safetensors"
        kernels = sj.kv.Kernels.from_arrays(np.ones((2, 8, 3)), np.ones(2), 0.5, "any")
        LayerKernels((kernels,), "any", 1).save(flows)
        written = {"kernels": flows, "heads": gates, "retaining": networks, "codebooks": books, "projections": turns}
        files = {option: str(file) for option, file in written.items()}
        for name, preset in sj.kv.presets().items():
            cache = preset.build(**{option: files[option] for option in preset.needs})
            cache = cache[0] if isinstance(cache, tuple) else cache
            endless = "yes" if cache.capacity is None else "no"
            row = f"| `{name}` | {tiers(cache)} | {preset.summary} | {endless} | {papers(preset.paper)} |"
            rows[kind_of(cache)].append(row)
    head = ["| preset | tiers | what it does | endless | paper |", "|---|---|---|---|---|"]
    return "\n\n".join("\n".join([f"**{kind}**", "", *head, *found]) for kind, found in rows.items() if found)


def kind_of(cache: sj.kv.Cache) -> str:
    """Which of `KINDS` a cache is, by what it is made of."""
    if isinstance(cache, sj.kv.HeadGroups):
        return "Groups of heads"
    if isinstance(cache, sj.kv.Budgeted):
        return "Budgets over layers and heads"
    parts = cache.tiers if isinstance(cache, sj.kv.Cascade) else (cache,)
    names = {type(part).__name__ for part in parts}
    if "Pooled" in names:
        return "Budgets over layers and heads"
    if names & {"Pages", "Bank", "ContentPages", "Clusters", "ChunkMemory"}:
        return "Pages that queries choose"
    if names & {"LowRank", "PrunedKeys", "Shadow", "Pairs", "Groups"}:
        return "Fewer channels"
    if any(getattr(part, "codec", None) is not None for part in parts):
        return "Fewer bits"
    if any(getattr(part, "merge", None) is not None for part in parts):
        return "What leaves is merged into what stays"
    return "Scores: what leaves is decided by head" if "Scored" in names else "Everything, windows and sinks"


def tiers(cache: sj.kv.Cache) -> str:
    """The tiers of a cache in words: "`Sink > Window`"."""
    if isinstance(cache, sj.kv.HeadGroups):
        (_, far), (_, near) = cache.groups
        return f"{tiers(far)} in some heads, {tiers(near)} in the others"
    if isinstance(cache, sj.kv.Budgeted):
        return f"{tiers(cache.cascade)}, sizes by layer"
    if isinstance(cache, sj.kv.Cascade):
        names = [type(tier).__name__.replace("SinkWindow", "Sink > Window") for tier in cache.tiers]
        return f"`{' > '.join(names)}`"
    return f"`{type(cache).__name__}`"


def papers(text: str) -> str:
    """Links to the papers whose numbers a preset names; where a paper has none, where it appeared."""
    links = [f"[{number}](https://arxiv.org/abs/{number})" for number in re.findall(r"\d{4}\.\d{5}", text)]
    return ", ".join(links) or text.rpartition(", ")[2].partition(" (")[0]


def families() -> str:
    """A row for each file that describes Hugging Face architectures: their names there, and what its docstring says."""
    rows = ["| models | `architectures` of config.json | what is particular |", "|---|---|---|"]
    for path in sorted((ROOT / "streamjax/models/families").glob("*.py")):
        module = importlib.import_module(f"streamjax.models.families.{path.stem}")
        held = [value for value in vars(module).values() if isinstance(value, Family) and value in FAMILIES.values()]
        if not held or path.stem == "__init__":
            continue
        said = " ".join((module.__doc__ or "").partition("\n\n")[0].split()).rstrip(".")
        linked = re.sub(r"\d{4}\.\d{5}", lambda number: f"[{number[0]}](https://arxiv.org/abs/{number[0]})", said)
        name, _, rest = linked.partition(": ")
        names = ", ".join(f"`{family.architectures[0]}`" for family in held)
        rows.append(f"| {name} | {names} | {rest} |")
    return "\n".join(rows)


def folders() -> str:
    """A line for each folder of the packages, from its docstring, and for each of the other folders."""
    lines = {}
    for package in ("streamjax", "pallas_kernels"):
        for path in (ROOT / package).rglob("__init__.py"):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            lines[path.parent.relative_to(ROOT).as_posix() + "/"] = text.partition("\n")[0].rstrip(".")
    silent = [name for name, line in lines.items() if not line]
    if silent:
        raise ValueError(f"the __init__.py of {', '.join(silent)} lacks a docstring that says what the folder holds")
    lines = {**dict(sorted(lines.items(), key=lambda item: (item[0].startswith("pallas"), item))), **OTHER_FOLDERS}
    width = max(map(len, lines))
    return "\n".join(["```", *(f"{name:{width}} {line}".replace("`", "") for name, line in lines.items()), "```"])


def written(page: str) -> str:
    """The text of a page with every table between its marks written anew.

    Raises:
      ValueError: the page lacks the marks of a table; a folder says nothing of itself.
    """
    for name, table in (("presets", presets), ("families", families), ("folders", folders)):
        begin, end = f"<!-- {name}: written by python -m docs.tables -->", f"<!-- {name} ends -->"
        before, first, rest = page.partition(begin)
        _, last, after = rest.partition(end)
        if not first or not last:
            raise ValueError(f"the page lacks the marks of {name!r}: {begin} and {end}")
        page = f"{before}{begin}\n{table()}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"written: {PAGE}")
