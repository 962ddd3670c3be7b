"""The public surface is `__all__`: nothing public is missing from it, nothing in it is missing."""

from __future__ import annotations

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import channel_metrics

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path
    for folder in ("channel_metrics", "patches")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__main__.py"
)


# Used through the command line, not imported by anybody else.
COMMANDS = {"cli", "demo", "extras", "jsonl", "summary"}
PUBLIC = [path for path in MODULES if not {path.stem, path.parent.name} & COMMANDS]


def names_defined(tree: ast.Module) -> Iterator[str]:
    """The functions, classes and constants of a module; not type aliases, not what it imports."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (target.id for target in targets if isinstance(target, ast.Name))
            yield from (name for name in names if name.isupper())


def names_imported(block: ast.Module | ast.If) -> Iterator[str]:
    for node in block.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def names_bound(tree: ast.Module) -> set[str]:
    """Whatever a module gives a name to at its top level, or in one branch of an `if` there."""
    branches = (n.body + n.orelse if isinstance(n, ast.If) else [n] for n in tree.body)
    tree = ast.Module([node for branch in branches for node in branch], [])
    assigned = {
        node.id
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    late = [node for node in tree.body if isinstance(node, ast.If)]
    blocks: list[ast.Module | ast.If] = [tree, *late]
    imported = {name for block in blocks for name in names_imported(block)}
    return assigned | set(names_defined(tree)) | imported


def declared(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_of_a_module_are_its_all(path: Path) -> None:
    tree = ast.parse(path.read_text())
    public = {name for name in names_defined(tree) if not name.startswith("_")}
    public.discard("TYPE_CHECKING")  # where typing is not imported, the name is defined
    assert public <= set(declared(tree)), "public, but not in __all__"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_all_exist(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert set(declared(tree)) <= names_bound(tree)
    assert len(declared(tree)) == len(set(declared(tree)))


def imported_for_types(tree: ast.Module) -> dict[str, str]:
    """{name: module} of the imports under `if TYPE_CHECKING:`."""
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_package_exports_exactly_its_all() -> None:
    typed = imported_for_types(ast.parse(Path(channel_metrics.__file__).read_text()))
    late = {name: f"channel_metrics.{part}" for name, part in channel_metrics._MODULES.items()}
    assert set(channel_metrics.__all__) == set(typed)
    assert late == typed, "what Python imports, and what type checkers see"
    assert set(channel_metrics.__all__) <= set(dir(channel_metrics))
    for name in channel_metrics.__all__:
        value = getattr(channel_metrics, name)
        assert value is getattr(importlib.import_module(typed[name]), name)


def test_a_name_that_is_not_exported_is_refused() -> None:
    with pytest.raises(AttributeError, match="'channel_metrics' has no attribute 'Sync'"):
        _ = channel_metrics.Sync
    with pytest.raises(ImportError, match="cannot import name 'Sync'"):
        from channel_metrics import Sync  # noqa: F401 - it must fail


def test_the_docstring_of_the_package_gives_what_it_shows() -> None:
    result = doctest.testmod(channel_metrics)
    assert result.attempted > 0
    assert result.failed == 0
