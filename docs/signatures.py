"""Names, signatures and docstrings of a package, read from its source without importing it.

A page may list a trainer that is not installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

Definition = ast.ClassDef | ast.FunctionDef


def interface_of(given: str) -> str:
    """A list of names, with what they do; attributes and methods stand below their class.

    Args:
        given: a package or module, for all names in its `__all__`; or some names after it.
    """
    package, *names = given.split()
    names = names or _all_of(_tree(package))
    return "\n".join(line for name in names for line in _entry(package, name))


def _entry(package: str, name: str) -> Iterator[str]:
    found = _find(package, name)
    if found is None:
        raise ValueError(f"{package}: no class or function {name!r} was found.")
    module, node = found
    if isinstance(node, ast.Assign):
        yield f"- **`{name}`**: a `{_called(node.value)}`"
        return
    yield f"- **`{_signature(module, node)}`**: {_summary(node)}"
    if isinstance(node, ast.ClassDef) and not name.endswith("Mixin"):
        yield from (f"    - `{one}`: {doc}" for one, doc in _attributes(node))
        methods: dict[str, ast.FunctionDef] = {}
        for method in _methods(module, node):
            methods.setdefault(method.name, method)  # the nearest class comes first
        for method in methods.values():
            yield f"    - `{_signature(module, method, bound=True)}`: {_summary(method)}"


def _methods(module: str, owner: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The public methods of a class, and of our classes that it extends."""
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and _is_public(node):
            yield node
    for base_module, base in _bases(module, owner):
        yield from _methods(base_module, base)


def _bases(module: str, owner: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """The classes of ours that a class extends."""
    for base in owner.bases:
        found = _find(module, ast.unparse(base))
        if found is not None and isinstance(found[1], ast.ClassDef):
            yield found[0], found[1]


def _is_public(method: ast.FunctionDef) -> bool:
    # A trainer calls the hooks of a callback.
    return not method.name.startswith(("_", "on_")) and ast.get_docstring(method) is not None


def _signature(module: str, node: Definition, *, bound: bool = False) -> str:
    if isinstance(node, ast.ClassDef):
        return f"{node.name}{_maker(module, node)}"
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        return node.name
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({_arguments(node.args, bound=bound)}){returns}"


def _maker(module: str, node: ast.ClassDef) -> str:
    """The arguments that make an object; of a dataclass, its fields."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return f"({_arguments(method.args, bound=True)})"
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return f"({', '.join(_fields(module, node))})"
    return ""


def _fields(module: str, node: ast.ClassDef) -> Iterator[str]:
    """The fields of a dataclass: its own, then those of the classes that it extends."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
            yield ast.unparse(field)
    for base_module, base in _bases(module, node):
        yield from _fields(base_module, base)


def _arguments(given: ast.arguments, *, bound: bool) -> str:
    text = ast.unparse(given)
    if not bound:
        return text
    own, _, rest = text.partition(", ")
    return rest if own in ("self", "cls") else text


def _summary(node: Definition) -> str:
    """The first paragraph of the docstring."""
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


def _attributes(node: ast.ClassDef) -> list[tuple[str, str]]:
    """The section `Attributes` of the docstring."""
    _, _, after = (ast.get_docstring(node) or "").partition("\nAttributes:\n")
    section = after.split("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return [(name, " ".join(doc.split())) for name, doc in found]


def _called(value: ast.expr) -> str:
    return ast.unparse(value.func) if isinstance(value, ast.Call) else ast.unparse(value)


def _find(module: str, name: str) -> tuple[str, Definition | ast.Assign] | None:
    """The definition of a name, which a module may import from another one of ours."""
    tree = _tree(module)
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return module, node
    for each in ast.walk(tree):
        if isinstance(each, ast.ImportFrom) and any(alias.name == name for alias in each.names):
            source = each.module or ""
            return _find(source, name) if source.startswith("channel_metrics") else None
    return None


def _all_of(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError("expected a package with __all__.")


def _tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))
