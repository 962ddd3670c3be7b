"""The public surface is `__all__`: nothing public is missing from it, nothing in it is missing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import channel_metrics

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path
    for folder in ("channel_metrics", "patches")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__main__.py"
)


def names_defined(tree: ast.Module) -> Iterator[str]:
    """What a module defines itself, and what a package re-exports is not among it."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def names_imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def declared(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_of_a_module_are_its_all(path: Path) -> None:
    tree = ast.parse(path.read_text())
    # `logger` is a convention of its own, and nobody's interface.
    public = {n for n in names_defined(tree) if not n.startswith("_") and n != "logger"}
    names = declared(tree)
    assert public <= set(names), "public, but not in __all__"
    assert set(names) <= public | set(names_imported(tree)) | {"__version__"}, "in __all__ only"
    assert len(names) == len(set(names))


def test_the_package_exports_exactly_its_all() -> None:
    tree = ast.parse(Path(channel_metrics.__file__).read_text())
    assert set(channel_metrics.__all__) == set(names_imported(tree))
    for name in channel_metrics.__all__:
        assert getattr(channel_metrics, name) is not None
