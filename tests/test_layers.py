"""Imports point down only: every module has a rank, and imports nothing above it."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvcache"

RANKS = {
    "__init__": 6,
    "cli": 5,
    "cli_arguments": 5,
    "cli_demo": 5,
    "cli_plan": 5,
    "cli_replay": 5,
    "cli_top": 5,
    "mlx_lm": 5,
    "mlx_rows": 5,
    "mlx_sequence": 5,
    "metrics": 4,
    "metric_table": 4,
    "admission": 4,
    "course": 4,
    "desk": 4,
    "lease": 4,
    "sleepers": 4,
    "victims": 4,
    "waiter": 4,
    "demo": 4,
    "demo_view": 4,
    "plan_record": 4,
    "plan_view": 4,
    "planning": 4,
    "replay": 4,
    "replay_baselines": 4,
    "replay_contents": 4,
    "replay_figures": 4,
    "replay_film": 4,
    "replay_plot": 4,
    "replay_prefill": 4,
    "replay_prompts": 4,
    "replay_sweep": 4,
    "replay_view": 4,
    "top_view": 4,
    "workloads": 4,
    "trace_forms": 3,
    "traces": 3,
    "cache": 3,
    "decode_batch": 3,
    "outside": 3,
    "sight": 3,
    "health": 3,
    "status": 3,
    "stats": 3,
    "arena": 2,
    "block_map": 2,
    "cache_file": 2,
    "options": 2,
    "queues": 2,
    "chunks": 2,
    "saving": 2,
    "store": 2,
    "store_files": 2,
    "store_jobs": 2,
    "store_memory": 2,
    "memory": 2,
    "btree": 0,
    "parking": 0,
    "refusals": 2,
    "strategies": 2,
    "suspension": 2,
    "tallies": 2,
    "waiting": 2,
    "costs": 2,
    "model_weights": 2,
    "mlx_graph": 2,
    "_alloc": 1,  # a door, as are _batch, _copy, _runs and _travel; behind them the rooms
    "_batch": 1,
    "_runs": 1,
    "_admit": 1,
    "_blocks": 1,
    "_calls": 1,
    "_check": 1,
    "_compact": 1,
    "_copy": 1,
    "_door": 1,
    "_evict": 1,
    "_foresight": 1,
    "_ids": 1,
    "_index": 1,
    "_journal": 1,
    "_leaves": 1,
    "_looks": 1,
    "_members": 1,
    "_pack": 1,
    "_pins": 1,
    "_placement": 1,
    "_policy": 1,
    "_pool": 1,
    "_prefixes": 1,
    "_prices": 1,
    "_reuse": 1,
    "_scatter": 1,
    "_sequences": 1,
    "_sharing": 1,
    "_sight": 1,
    "_slides": 1,
    "_space": 1,
    "_travel": 1,
    "_windows": 1,
    "_worth": 1,
    "_writes": 1,
    "model_config": 0,
    "model_families": 0,
    "model_fields": 0,
    "model_heads": 0,
    "model_layers": 0,
    "model_states": 0,
    "_lock": 0,
    "_moves": 0,
    "_version": 0,
    "errors": 0,
    "spec": 0,
}
DOORS = {
    "_door",
    "_ids",
    "_prefixes",
    "_alloc",
    "_batch",
    "_copy",
    "_runs",
    "_travel",
}  # the other native modules are closed to the ranks above
ROOMS = {name for name, rank in RANKS.items() if rank == 1} - DOORS
ONLY_IMPORTER = {"mlx_lm": "mlx_lm"}  # outside package -> the one module that may import it
OPTIONAL = (
    "mlx",
    "mlx_lm",
    "ml_dtypes",
    "rich",
    "typer",
    "matplotlib",
    "joblib",
    "distributed",
    "prometheus_client",
    "opentelemetry",
    "safetensors",
    "xxhash",
)

CIMPORT = re.compile(r"^\s*from\s+([\w.]+)\s+c?import\s+(\(?[\w ,]*)|^\s*c?import\s+([\w., ]+)", re.MULTILINE)


def modules():
    return sorted({path.stem for kind in ("py", "pyx", "pxd") for path in PACKAGE.glob(f"*.{kind}")})


def targets_of_python(text):
    """Yields the dotted name of everything imported, at any depth of the file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["kvcache" if node.level else "", node.module]))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def targets_of_cython(text):
    for origin, names, whole in CIMPORT.findall(text):
        if whole:
            yield from (name.split(" as ")[0].strip() for name in whole.split(","))
        else:
            above = re.sub(r"^\.", "kvcache.", origin).rstrip(".")
            yield from (f"{above}.{name.split(' as ')[0].strip()}" for name in names.strip("(").split(","))


def targets_of(module):
    for path in PACKAGE.glob(f"{module}.p*"):
        if path.suffix in (".py", ".pyi"):
            yield from targets_of_python(path.read_text())
        elif path.suffix in (".pyx", ".pxd"):
            yield from targets_of_cython(path.read_text())


def imported_by(module):
    """Modules of the package that one of them imports; a name of the package's top counts as `__init__`."""
    found = set()
    for target in targets_of(module):
        top, _, rest = target.partition(".")
        if top == "kvcache":
            name = rest.split(".")[0]
            found.add(name if name in modules() else "__init__")
    return found - {module}


def complaints(module, imports):
    for other in sorted(imports):
        if RANKS[other] > RANKS[module]:
            yield f"{module} (rank {RANKS[module]}) imports {other} (rank {RANKS[other]})"
        if other in ROOMS and RANKS[module] > 1:
            yield f"{module} imports {other}: a room behind a door"


def test_every_module_has_a_rank():
    assert set(modules()) <= set(RANKS), "a new module: give it a rank"


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    assert list(complaints(module, imported_by(module))) == []


def test_no_modules_import_each_other_in_a_circle():
    try:
        tuple(TopologicalSorter({module: imported_by(module) for module in modules()}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", ONLY_IMPORTER)
def test_only_one_module_knows_the_package(package):
    importers = {
        module for module in modules() for target in targets_of(module) if target.split(".")[0] == package
    }
    assert importers <= {ONLY_IMPORTER[package]}


def test_importing_the_package_imports_no_optional_library():
    script = f"import sys, kvcache; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_an_import_that_points_up_is_named():
    up = set(targets_of_python("def late():\n    from kvcache.cache import KVCache\n    from . import demo"))
    assert up == {"kvcache.cache.KVCache", "kvcache.demo"}
    assert list(complaints("arena", {"cache"})) == ["arena (rank 2) imports cache (rank 3)"]
    assert list(complaints("cache", {"_blocks"})) == ["cache imports _blocks: a room behind a door"]


def test_cimports_are_read_in_all_their_forms():
    text = """
from kvcache._moves cimport (
    move_f,
)
from kvcache cimport _lock, _blocks as rooms
from ._placement cimport place
cimport kvcache._sequences
import kvcache.errors as errors
"""
    assert {target.split(".")[1] for target in targets_of_cython(text)} == {
        "_moves", "_lock", "_blocks", "_placement", "_sequences", "errors"
    }  # fmt: skip
