"""The channel of each entry of `datasets:`, and the search for duplicates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from channel_metrics.trainers.hf.columns import NAMES_COLUMN

__all__ = ["label_of", "unique_rows"]


def label_of(entry: Any, entries: Sequence[Any]) -> str:
    """The channel of an entry of `datasets:`.

    Args:
        entry: it has a `path`, and may have a `name`.
        entries: all of them.

    Returns:
        Its `name`; without one, the shortest end of its path that no other path has.
    """
    if entry.get("name"):
        return str(entry["name"])
    parts = _parts(entry)
    others = [other for other in map(_parts, entries) if other != parts]
    ends = (parts[-count:] for count in range(1, len(parts) + 1))
    end = next(e for e in ends if all(other[-len(e) :] != e for other in others))
    return "/".join(end).strip("/")


def _parts(entry: Any) -> tuple[str, ...]:
    files = entry.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    path = PurePath(files[0] if len(files) == 1 else entry["path"])
    # Not the end of a version, as in `data-v1.5`.
    path = path.with_suffix("") if path.suffix[1:].isalpha() else path
    return ("", *path.parts)


def unique_rows(find: Callable[..., Any], dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """Find duplicates without regard to the channel. The first of several is kept.

    Args:
        find: Axolotl's function, which compares all columns.
        dataset: the dataset; the other arguments are passed on.
    """
    kind = dataset.format["type"]
    others = [column for column in dataset.column_names if column != NAMES_COLUMN]
    unique, seen = find(dataset.with_format(kind, columns=others), *args, **kwargs)
    return unique.with_format(kind), seen
