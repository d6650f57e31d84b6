"""Imports point down the layers of docs/architecture.md and never in a circle, wherever in a module they stand."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = """
    __main__ cli commands
    report
    estimate
    training
    evaluation
    memory
    model
    data
    run_directory recipes idle_options config forget_terms sources stop_conditions
    claim endings environment libraries console progress files ranges records settings_file sizes errors lowmem_npo
    lowmem_kernels
"""  # each line may import itself and those below it; lowmem_npo alone is its __init__
LEVEL = {unit: level for level, units in enumerate(LAYERS.split("\n")) for unit in units.split()}


class Import(NamedTuple):
    """An import statement: the module it is in, the module it names, its line, and when it runs."""

    importer: str
    imported: str
    line: int
    when: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported} ({self.when})"


def modules() -> dict[str, Path]:
    """Every module of lowmem_npo and lowmem_kernels by its name; a package is its __init__."""
    roots = {ROOT: "lowmem_npo", ROOT / "kernels": "lowmem_kernels"}
    paths = [(root, path) for root, package in roots.items() for path in sorted((root / package).rglob("*.py"))]
    return {".".join(p.relative_to(r).with_suffix("").parts).removesuffix(".__init__"): p for r, p in paths}


MODULES = modules()


def imports_of(module: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in `source`; of `from a import b` the name a.b, which may be a module or not."""

    def names(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
        base = ".".join([*package, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]

    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (Import(module, name, node.lineno, when) for name in names(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = "when called"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = "for types only"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, when)

    yield from visit(ast.parse(source), "when imported")


def unit_of(module: str) -> str:
    """The package or module directly under lowmem_npo that `module` belongs to; lowmem_kernels is one unit."""
    root, *rest = module.split(".")
    return rest[0] if root == "lowmem_npo" and rest and rest[0] in LEVEL else root


def upward(imports: Iterable[Import]) -> list[Import]:
    return [i for i in imports if LEVEL.get(unit_of(i.imported), len(LEVEL)) < LEVEL[unit_of(i.importer)]]


def module_of(name: str) -> str:
    """The module that holds `name`, or "" if it is none of ours."""
    return name if name in MODULES or not name else module_of(name.rpartition(".")[0])


def cycles(imports: Iterable[Import], node: Callable[[str], str] = unit_of) -> list[Import]:
    """The imports that lie on a circle of nodes: of packages, or of modules."""
    edges = [i for i in imports if module_of(i.imported) and node(i.imported) != node(i.importer)]
    imported = defaultdict[str, set[str]](set)
    for edge in edges:
        imported[node(edge.importer)].add(node(edge.imported))

    @cache
    def reachable(start: str) -> set[str]:
        seen, unvisited = set[str](), [start]
        while unvisited:
            new = imported[unvisited.pop()] - seen
            unvisited += new
            seen |= new
        return seen

    return [i for i in edges if node(i.importer) in reachable(node(i.imported))]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    """Of every module."""
    sources = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    return [i for name in MODULES for i in imports_of(name, sources[name], MODULES[name].stem == "__init__")]


def lines(imports: Iterable[Import]) -> str:
    return "\n".join(map(str, imports))


def test_every_package_has_a_layer():
    assert {name.split(".")[1] for name in MODULES if name.startswith("lowmem_npo.")} <= LEVEL.keys()


def test_imports_point_down(imports):
    assert len(imports) > 500
    assert not upward(imports), lines(upward(imports))


def test_nothing_is_imported_in_a_circle(imports):
    for node in (unit_of, module_of):
        assert not cycles(imports, node), lines(cycles(imports, node))


def test_the_kernels_need_torch_and_triton_only(imports):
    allowed = {"lowmem_kernels", "torch", "triton", *sys.stdlib_module_names}
    others = [i for i in imports if unit_of(i.importer) == "lowmem_kernels" and i.imported.split(".")[0] not in allowed]
    assert not others, lines(others)


@pytest.mark.parametrize(
    "source, when",
    [
        ("from lowmem_npo.training.trainer import NPOTrainer", "when imported"),
        ("from lowmem_npo import training", "when imported"),
        ("from ..training import trainer", "when imported"),
        ("def load():\n    import lowmem_npo.training", "when called"),
        ("if typing.TYPE_CHECKING:\n    from lowmem_npo.training import trainer", "for types only"),
        ("try:\n    from lowmem_npo import cli\nexcept ImportError: pass", "when imported"),
    ],
)
def test_an_upward_import_is_noticed(source, when):
    (planted,) = upward(imports_of("lowmem_npo.model.loading", source))
    assert planted.when == when and "lowmem_npo.model.loading:" in str(planted)
    assert not upward(imports_of("lowmem_npo.commands.merge", source))


def test_a_cycle_is_noticed():
    sources = {"files": "from lowmem_npo import sizes", "sizes": "import lowmem_npo.errors",
               "errors": "def f():\n from .files import x", "config": "from lowmem_npo.files import y"}  # fmt: skip
    planted = [i for name, source in sources.items() for i in imports_of(f"lowmem_npo.{name}", source)]
    assert not upward(planted)
    for node in (unit_of, module_of):
        assert [i.importer.split(".")[1] for i in cycles(planted, node)] == ["files", "sizes", "errors"]
    assert not cycles(planted[1:])
