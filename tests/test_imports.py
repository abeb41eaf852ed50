"""Imports run one way: every module of the library stands in a room, and imports from rooms below it only.

`ROOMS` is the layout of docs/design.md, lowest first, down to the files that are a folder's contract (`kv/tier.py` lies
below the tiers, `kv/cascade.py` above them). Inside a room files may import each other, but never in a circle. Imports
inside of functions count too: they are arrows all the same. Imports for type checkers alone do not.
"""

import ast
import re
from collections import defaultdict
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A name stands for a module, or for a package with all that is in it and has no line of its own.
ROOMS = """
    pallas_kernels.partial pallas_kernels.patterns pallas_kernels.padding pallas_kernels.block_ranges
    pallas_kernels.tile_logits pallas_kernels.choice_tiles pallas_kernels.flash_call pallas_kernels.coded
    pallas_kernels.unpacking.protocol pallas_kernels.argument_checks
    pallas_kernels.recurrence_products pallas_kernels.recurrence_block
    pallas_kernels.tpu pallas_kernels.gpu pallas_kernels.reference
    pallas_kernels.unpacking
    pallas_kernels.api
    pallas_kernels
    streamjax.field_checks streamjax.lazy_names streamjax.barriers streamjax.byte_units streamjax.host_programs
    streamjax.host_memory
    streamjax.parallel
    streamjax.checkpoints
    streamjax.snapshots
    streamjax.data.text
    streamjax.data.recall
    streamjax.data.ruler
    streamjax.data
    streamjax.attention
    streamjax.kv.slots.ring_buffer
    streamjax.kv.codecs
    streamjax.kv.query streamjax.kv.tier streamjax.kv.cache streamjax.kv.noting streamjax.kv.eviction_blocks
    streamjax.kv.layer_tables
    streamjax.kv.noted_attention
    streamjax.kv.decode_kernels
    streamjax.kv.slots.ring_state streamjax.kv.slots.slot_state streamjax.kv.slots.over_devices
    streamjax.kv.scores
    streamjax.kv.merging
    streamjax.kv.pages
    streamjax.kv.tiers
    streamjax.kv.channels streamjax.kv.selective
    streamjax.kv.cascade streamjax.kv.head_groups streamjax.kv.shared_front streamjax.kv.layer_caches
    streamjax.kv.budgets
    streamjax.kv.compaction streamjax.kv.budgets.measuring
    streamjax.kv.layouts
    streamjax.kv.presets
    streamjax.kv
    streamjax.models.config streamjax.models.rope streamjax.models.rounding
    streamjax.models.quantisation streamjax.models.parameters
    streamjax.models.norms
    streamjax.models.lora.adapters
    streamjax.models.mlps streamjax.models.mixers
    streamjax.models.layer_inputs
    streamjax.models.block
    streamjax.models.decoder streamjax.models.layer_stacking streamjax.models.side_network
    streamjax.models.calibration streamjax.models.quantising
    streamjax.models.conversion
    streamjax.models.lora
    streamjax.models.families
    streamjax.models.files
    streamjax.models
    streamjax.streaming
    streamjax.training.objectives
    streamjax.training.schedules
    streamjax.training.elimination
    streamjax.training.backprop.trainable_parameters
    streamjax.training.backprop.sequence_chunks streamjax.training.backprop.gradient_*
    streamjax.training.backprop.chunk_attention
    streamjax.training.backprop.storage
    streamjax.training.backprop.loss_kernels
    streamjax.training.backprop.head
    streamjax.training.backprop.embedding_and_head
    streamjax.training.backprop.planning
    streamjax.training.backprop
    streamjax.training.heads streamjax.training.sequence_groups
    streamjax.training.mesh_choice streamjax.training.pipeline
    streamjax.training.post_training streamjax.training.distillation
    streamjax.training.run streamjax.training.diloco
    streamjax.training
    streamjax.evaluation
    streamjax.serving
    streamjax
    streamjax.commands
"""
LINES = [line.split() for line in ROOMS.strip().splitlines()]


def modules(*folders: str) -> dict[str, Path]:
    """Files by the names under which they are imported."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: set[str]) -> set[str]:
    """Those of the known modules that a source imports."""

    def walk(node: ast.AST) -> set[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return set()
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names} & known
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            return (names & known) or ({node.module or ""} & known)
        return set().union(*map(walk, ast.iter_child_nodes(node)))

    return walk(ast.parse(source))


def floor(module: str) -> int:
    """The line of ROOMS that a module is on: the one that names most of its path."""
    fits = [
        (name.count("."), -index)
        for index, names in enumerate(LINES)
        for name in names
        if fnmatch(module, name) or module.startswith(f"{name}.")
    ]
    assert fits, f"{module} has no place in ROOMS"
    return -max(fits)[1]


@cache
def arrows(*folders: str, among: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """What each module of these folders imports of them, and of those that it is `among`."""
    known = set(modules(*folders, *among))
    return {
        name: imported(path.read_text(encoding="utf-8"), known) - {name} for name, path in modules(*folders).items()
    }


def test_imports_run_downwards():
    graph = arrows("pallas_kernels", "streamjax")
    up = [f"{a} imports {b}" for a, targets in graph.items() for b in sorted(targets) if floor(b) > floor(a)]
    assert not up


def test_no_module_imports_itself_through_others():
    graph = arrows("pallas_kernels", "streamjax")
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_library_knows_no_entry_and_no_benchmark():
    graph = arrows("pallas_kernels", "streamjax", "infer", "train", among=("benchmarks", "configs", "tests"))
    for name, targets in graph.items():
        if name.split(".")[0] in ("pallas_kernels", "streamjax"):
            assert not {target for target in targets if target.split(".")[0] not in ("pallas_kernels", "streamjax")}, (
                name
            )
        if name.split(".")[0] in ("infer", "train"):
            assert all(target.startswith("streamjax") for target in targets), name


def test_imports_are_absolute():
    for name, path in modules("benchmarks", "infer", "train", "configs", "tests").items():
        assert not re.search(r"^ *from \.", path.read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_room_is_there():
    names = set(modules("pallas_kernels", "streamjax"))
    assert not [room for line in LINES for room in line if not any(fnmatch(name, room) for name in names)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import a.b", {"a.b"}),
        ("from a import b", {"a.b"}),
        ("from a.b import thing", {"a.b"}),
        ("def f():\n    from a import b", {"a.b"}),
        ("if TYPE_CHECKING:\n    from a import b\nelse:\n    import a", set()),
        ("import numpy", set()),
    ],
)
def test_imports_are_found(source, found):
    assert imported(source, {"a", "a.b"}) == found


def test_a_file_and_a_folder_stay_small():
    """CONTRIBUTING.md: a file has one subject and about 300 lines, a folder one subject and about 12 files."""
    sizes, folders = {}, defaultdict(int)
    for name, path in modules("pallas_kernels", "streamjax", "benchmarks", "infer", "train").items():
        sizes[name] = path.read_text(encoding="utf-8").count("\n")
        folders[path.parent.relative_to(ROOT).as_posix()] += path.name != "__init__.py"
    assert not {name: size for name, size in sizes.items() if size > 450}
    # many small files of one kind
    collections = ("streamjax/kv/presets", "streamjax/kv/scores", "streamjax/models/families")
    assert not {folder: count for folder, count in folders.items() if count > 14 and folder not in collections}


def code_lines(source: str) -> int:
    """Lines that are neither blank, nor an import, a docstring or a comment."""
    tree = ast.parse(source)
    left = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left -= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            left -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(left)


@pytest.mark.quick
def test_a_score_has_40_lines_and_a_preset_25():
    """What several need is their base's to do: score.py, layer_tables.py; registry.py, in_codes.py."""
    assert code_lines('"""One."""\nimport a\n\nx = (  # a comment behind code\n    1\n)\n# alone\n') == 3
    bases = {"__init__.py", "score.py", "registry.py", "in_codes.py"}
    for folder, most in (("scores", 40), ("presets", 25)):
        files = [path for path in (ROOT / "streamjax/kv" / folder).glob("*.py") if path.name not in bases]
        lines = {path.name: code_lines(path.read_text(encoding="utf-8")) for path in files}
        assert len(lines) > 20
        assert not {name: count for name, count in lines.items() if count > most}, folder
