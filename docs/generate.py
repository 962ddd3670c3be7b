"""Writes the generated parts of the pages: `python docs/generate.py`.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. It is written from the code.
tests/project/test_generated_docs.py checks that all parts are up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from channel_metrics.config import MetricsConfig
from channel_metrics.core.objectives import OBJECTIVES
from channel_metrics.core.percentiles import BINS
from channel_metrics.core.schema import TOKENS, Metric, Schema

# `python docs/generate.py` finds it beside this file, tests and mypy in the package.
try:
    from docs.signatures import interface_of
except ModuleNotFoundError:
    from signatures import interface_of  # type: ignore[import-not-found, no-redef]  # as a script

# The settings that most runs need; the others of a class come after them, its own before those
# of the classes that it extends.
_FIRST: dict[type, tuple[str, ...]] = {
    MetricsConfig: ("fields", "metrics", "channels", "eval_channels", "key_format", "on_error")
}
# In place of a line for each bin.
_BINS = f"{BINS[0]}` to `{BINS[-1]}"

# The cost of a metric from sums that are always counted.
_FREE = "free"

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/REFERENCE.md", "docs/config.md")
PART = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def generated(text: str) -> str:
    """A page with its generated parts as they should be.

    Args:
        text: the page, Markdown.

    Raises:
        ValueError: the page has no part, or a part without an end.
    """
    found = PART.findall(text)
    if not found or len(found) != text.count("<!-- generated: "):
        raise ValueError("expected <!-- generated: NAME --> and then <!-- end -->; one is missing.")
    return PART.sub(lambda part: f"{part[1]}\n{part_of(part[2])}\n\n{part[3]}", text)


def part_of(name: str) -> str:
    """The text of a part, such as `metrics`, or `settings channel_metrics.config:MetricsConfig`."""
    kind, _, argument = name.partition(" ")
    if kind == "settings":
        return settings_of(_imported(argument))
    if kind == "schema":
        return schema_of(_imported(argument))
    if kind == "interface":
        return _linked(interface_of(argument))
    return PARTS[kind]()


def schema_of(schema: Schema) -> str:
    """The metrics and the columns of a schema, as two tables."""
    metrics = [
        (
            f"`{metric.name}`",
            metric.unit or "0 to 1",
            metric.doc,
            _sources(metric),
            _cost(schema, metric),
        )
        for metric in schema.metrics
    ]
    metrics += [
        (
            f"`{column.name}_total`",
            column.unit,
            f"`{column.name}` since the run began",
            f"`{column.name}`",
            _FREE,
        )
        for column in schema.columns
        if column.total
    ]
    metrics += [
        (f"`{one.name}`", one.unit, one.doc, one.source, one.cost or _FREE) for one in schema.extra
    ]
    columns = [
        (f"`{name}`", column.unit, column.doc)
        for name, column in ((c.name if c.name not in BINS else _BINS, c) for c in schema.columns)
        if column.name not in BINS[1:]
    ]
    return "\n".join(
        (
            table(("metric", "unit", "what it is", "computed from", "cost"), metrics),
            "",
            "Their sums, one of each per channel:",
            "",
            table(("column", "unit", "what is added up"), columns),
        )
    )


def _sources(metric: Metric) -> str:
    """The columns that a metric is computed from."""
    names = [_BINS if name == BINS[0] else name for name in metric.needs if name not in BINS[1:]]
    return ", ".join("all tokens" if name == "all" else f"`{name}`" for name in names)


def _cost(schema: Schema, metric: Metric) -> str:
    """The columns that are added up only for it and its like, and what else it needs."""
    optional = {column.name for column in schema.columns if column.optional}
    number = len(optional.intersection(metric.needs))
    columns = f"{number} more columns" if number else ""
    return "; ".join(part for part in (columns, metric.cost) if part) or _FREE


def objectives() -> str:
    """The objectives over channels, as a table."""
    rows = [(f"`{one.name}`", f"`eval_{one.name}`", one.doc) for one in OBJECTIVES]
    return table(("objective", "in evaluation", "what it is"), rows)


def settings_of(cls: type) -> str:
    """The fields of a dataclass, with what stands below each of them in the code."""
    docs, hints = _field_docs(cls), get_type_hints(cls)
    items = {item.name: item for item in dataclasses.fields(cls)}
    own = [name for name in items if name in inspect.get_annotations(cls)]
    order = dict.fromkeys((*_FIRST.get(cls, ()), *own, *items))
    rows = [
        (f"`{name}`", f"`{_type(hints[name])}`", _default(items[name]), _linked(docs[name]))
        for name in order
    ]
    return table(("setting", "type", "default", "what it does"), rows)


def _linked(doc: str) -> str:
    """A docstring with links in place of `docs/stream.md` and so on."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", doc)


def commands() -> str:
    """The commands of `channel-metrics`, with arguments and options."""
    from channel_metrics.cli.main import app

    parts = []
    for command in app.registered_commands:
        function = command.callback
        assert function is not None and command.name is not None
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        rows = [_option(item) for item in parameters if get_args(item.annotation)[1:]]
        parts += [
            f"### channel-metrics {command.name}",
            inspect.cleandoc(function.__doc__ or ""),
            table(("argument", "what it is"), rows),
        ]
    return "\n\n".join(parts)


def errors() -> str:
    """The error classes, as a table."""
    module = importlib.import_module("channel_metrics.errors")
    classes = [vars(module)[name] for name in module.__all__ if name.endswith("Error")]
    rows = [(f"`{cls.__name__}`", f"`{cls.__base__.__name__}`", cls.__doc__) for cls in classes]
    return table(("error", "is a", "when"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "metrics": lambda: schema_of(TOKENS),
    "objectives": objectives,
    "commands": commands,
    "errors": errors,
}


def table(heads: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _field_docs(cls: type) -> dict[str, str]:
    """{field: the string that stands below it}, of a dataclass and those that it extends."""
    docs = {}
    for owner in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(below.value))
    return docs


def _type(annotation: Any) -> str:
    """The type, with the values of a `Literal` in its place."""
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(value) for value in get_args(annotation))
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return " or ".join(_type(part) for part in get_args(annotation))
    if get_origin(annotation) in (Mapping, dict):
        return "mapping"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__.replace("NoneType", "None")
    return re.sub(r"(?:\w+\.)+(?=\w)", "", str(annotation))  # without modules


def _default(item: dataclasses.Field[Any]) -> str:
    factory: Any = item.default_factory
    if factory is not dataclasses.MISSING:
        return "`{}`" if factory is dict else f"`{factory.__name__}()`"
    if item.default is dataclasses.MISSING:
        return "none: must be given"
    value = list(item.default) if isinstance(item.default, tuple) else item.default
    return '`""`' if value == "" else f"`{value}`"


def _option(item: inspect.Parameter) -> tuple[str, str]:
    info = get_args(item.annotation)[1]
    # With Annotated, typer takes the first name for a default.
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    if type(info).__name__ == "ArgumentInfo":
        return f"`{item.name.upper()}`", info.help
    name = ", ".join(names) or "--" + item.name.replace("_", "-")
    if item.default is True:
        return f"`{name}`, `{name.replace('--', '--no-', 1)}`", f"{info.help} Default: yes."
    shown = "" if item.default in (None, False, "", inspect.Parameter.empty) else item.default
    return f"`{name}`", info.help + (f" Default: {shown}." if shown else "")


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")
