"""The settings `axes`, `cross` and `axis_format`: what they may be, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from channel_metrics.core.names import MARK
from channel_metrics.errors import ConfigError, hint

__all__ = [
    "CHANNEL",
    "COLUMN",
    "LENGTH",
    "MODALITIES",
    "MODALITY",
    "POSITION",
    "ROLES",
    "ROLES_FIELD",
    "TEXT",
    "TREE",
    "TREE_MEAN",
    "Source",
    "axes_of",
    "axis_fields",
    "check_axis_format",
    "token_fields",
    "token_source",
]

# What the first axis is called in `cross`.
CHANNEL = "channel"
# The axes of the groups that the names of channels show.
TREE, TREE_MEAN = "tree", "tree_mean"
# What the labels of single tokens may come from.
POSITION, LENGTH, COLUMN, MODALITY = "position", "length", "column", "modality"
_TEMPLATE = "template"
# The labels of an axis by column, and of one by modality, if the config does not name them.
ROLES = ("system", "user", "assistant", "tool", "thinking")
# The field of an axis by template, which no record has: ms-swift's template fills it.
ROLES_FIELD = "roles of ms-swift's template"
TEXT, MODALITIES = "text", ("image", "video", "audio")
_MOST_LABELS, _MOST_AXES = 254, 7
_TAKEN = (CHANNEL, TREE, TREE_MEAN)
_AXIS_NAME = re.compile(r"[A-Za-z_][\w-]*")
_BY = "by"

# Fields that hold the label, or {channel: label}, or {"by": what labels the tokens, ...}.
Source = tuple[str, ...] | Mapping[str, Any]


def token_source(source: Any) -> str | None:
    """What labels the single tokens on an axis; None if its labels are those of records."""
    return source.get(_BY) if isinstance(source, Mapping) else None


def axis_fields(axes: Mapping[str, Source]) -> tuple[str, ...]:
    """The entries for `channels_of` that read the labels of these axes."""
    return tuple(
        f"{axis}{MARK}{field}"
        for axis, source in axes.items()
        if not isinstance(source, Mapping)
        for field in source
    )


def token_fields(axes: Mapping[str, Source]) -> tuple[str, ...]:
    """The fields that hold a label per token."""
    return tuple(
        source["field"]
        for source in axes.values()
        if isinstance(source, Mapping) and token_source(source) == COLUMN
    )


def axes_of(given: Any, cross: Any = ()) -> tuple[dict[str, Source], tuple[tuple[str, ...], ...]]:
    """The settings `axes` and `cross`, checked.

    Args:
        given: {axis: field, fields, or {channel: label}}.
        cross: lists of axes.

    Raises:
        ConfigError: one of them has another form, or an axis is unknown.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"axes must map the name of an axis to its field, but is {given!r}.")
    axes = {_axis_name(axis): _source(axis, source) for axis, source in given.items()}
    if sum(token_source(source) == COLUMN for source in axes.values()) > _MOST_AXES:
        raise ConfigError(f"axes may hold {_MOST_AXES} axes by {COLUMN}, but hold more.")
    if not isinstance(cross, (list, tuple)):
        raise ConfigError(f"cross must be a list of lists of axes, but is {cross!r}.")
    known = [CHANNEL, *(axis for axis, source in axes.items() if not token_source(source))]
    for names in cross:
        if not isinstance(names, (list, tuple)) or len({*names}) != len(names) or len(names) < 2:
            raise ConfigError(
                f"an entry of cross must list two or more different axes, but is {names!r}."
            )
        for name in names:
            if name not in known:
                raise ConfigError(f"cross names the axis {name!r}; {hint(str(name), known)}")
    return axes, tuple(tuple(names) for names in cross)


def check_axis_format(form: Any) -> None:
    """Raise `ConfigError` unless `form` has `{axis}` and `{label}`."""
    try:
        whole = form.format(axis="\1", label="\2")
    except (AttributeError, LookupError, ValueError):
        whole = ""
    if "\1" not in whole or "\2" not in whole:
        raise ConfigError(
            f"axis_format must be built from {{axis}} and {{label}}, but is {form!r}."
        )


def _axis_name(name: Any) -> str:
    if not isinstance(name, str) or not _AXIS_NAME.fullmatch(name) or name in _TAKEN:
        raise ConfigError(
            f"the name of an axis must be letters, digits, _ and -, and none of "
            f"{', '.join(_TAKEN)}, but is {name!r}."
        )
    return name


def _source(axis: Any, source: Any) -> Source:
    if isinstance(source, str):
        return (source,)
    if isinstance(source, Mapping) and _BY in source:
        return _of_tokens(axis, source)
    if isinstance(source, Mapping):
        for channel, label in source.items():
            if not isinstance(channel, str) or not isinstance(label, str) or not label.strip():
                raise ConfigError(
                    f"axes.{axis} must map names of channels to names of labels, but maps "
                    f"{channel!r} to {label!r}."
                )
        return {channel.strip(): label.strip() for channel, label in source.items()}
    if isinstance(source, (list, tuple)) and all(isinstance(field, str) for field in source):
        return tuple(source)
    raise ConfigError(
        f"axes.{axis} must be a field, a list of fields, or a mapping of channels to labels, but "
        f"is {source!r}."
    )


def _of_tokens(axis: Any, source: Mapping[str, Any]) -> Source:
    """The source of an axis of single tokens, with all its settings."""
    by, keys = source[_BY], set(source) - {_BY}
    if by in (POSITION, LENGTH) and not keys:
        return dict(source)
    if by == COLUMN and {"field"} <= keys <= {"field", "labels"}:
        return {_BY: by, "field": source["field"], "labels": _entries(axis, source)}
    if by == _TEMPLATE and not keys:
        return {_BY: COLUMN, "field": ROLES_FIELD, "labels": {role: role for role in ROLES}}
    if by == MODALITY and keys <= {"labels"}:
        return {_BY: by, **({"labels": _token_ids(axis, source["labels"])} if keys else {})}
    raise ConfigError(
        f"axes.{axis} must be {{by: {POSITION}}}, {{by: {LENGTH}}}, {{by: {COLUMN}, field: ..., "
        f"labels: [...]}}, {{by: {_TEMPLATE}}} or {{by: {MODALITY}, labels: {{...}}}}, but is "
        f"{source!r}."
    )


def _entries(axis: Any, source: Mapping[str, Any]) -> dict[Any, str]:
    """{entry of the column: label}"""
    labels = source.get("labels", ROLES)
    if isinstance(labels, (list, tuple)):
        labels = {name: name for name in labels}
    names = {*labels.values()} if isinstance(labels, Mapping) else {None}
    fits = 0 < len(names) <= _MOST_LABELS
    if not fits or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(
            f"axes.{axis}.labels must list up to {_MOST_LABELS} names, or map the entries of "
            f"{source['field']!r} to names, but is {labels!r}."
        )
    return dict(labels)


def _token_ids(axis: Any, labels: Any) -> dict[str, list[int]]:
    """{label: token ids}"""
    found: dict[str, list[int]] = {}
    for name, given in labels.items() if isinstance(labels, Mapping) else ():
        found[name] = [given] if isinstance(given, int) else list(given)
    ids = [one for of_label in found.values() for one in of_label]
    if not ids or not all(isinstance(n, str) and n.strip() for n in found):
        raise ConfigError(
            f"axes.{axis}.labels must map names to token ids, such as {{image: 151655}}, but is "
            f"{labels!r}."
        )
    if not all(isinstance(one, int) and one >= 0 for one in ids) or len({*ids}) < len(ids):
        raise ConfigError(
            f"axes.{axis}.labels must hold token ids from 0 on, each once, but is {labels!r}."
        )
    return found
